"""The zoo: models with one planted bug each, and the promises that must come out broken by it.

Source   where such a bug has been seen stands in its docstring: in BlaGPT, whose published losses it spoilt; in papers' code;
         in the field (nanochat#844: three leaks that a real evaluator let pass)
How      a bug is a part or a model that derives from a sound one and changes a line; `Bug.sound` is the model without it,
         which keeps the same promises
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from helpers import attention, block, qk_norm, tiny, tiny_gpt2
from zoo_models import (
    AddsNoise,
    AllVectors,
    AnotherTemperature,
    AnotherTotal,
    AverageOfTheBatch,
    ClipsItself,
    CountsAll,
    Deaf,
    DoubleShift,
    DrawnAnew,
    FixedRate,
    Forgotten,
    GrowingBuffer,
    InfiniteAtTwenty,
    InTwoGroups,
    LastWeighsMore,
    LongerRuler,
    MeanOfBatches,
    MeanOfMeans,
    Misdeclared,
    NextRow,
    NothingButBias,
    Peeks,
    ReadsElsewhere,
    Remembers,
    Reseeds,
    Restarts,
    Rolled,
    RulerOfAll,
    ShiftedInput,
    SkipsTallMatrices,
    SumOfMicroBatches,
    Unused,
    Whisper,
    WithoutPad,
    WithoutRole,
    WritesTokens,
)
from zoo_parts import (
    AcrossAnEdge,
    AnotherWhenCompiled,
    AsksTheData,
    BiasOfTheFirstCall,
    BorrowedQueries,
    Convolution,
    CountedTwice,
    CutShort,
    CutValues,
    DropsInEvaluation,
    EdgeForgotten,
    ExpertChoice,
    FromTheEnd,
    Frozen,
    InAList,
    KeysFromTheEnd,
    MaskLostInHalf,
    MaskLostUnderDropout,
    MaskOfTheFirstCall,
    NotANumber,
    OffByOne,
    OnMultiples,
    OverTheBatch,
    OverTime,
    OwnGenerator,
    RunningStatistics,
    SecondChunk,
    ShortWindow,
    SilentHead,
    SoftmaxInHalf,
    SoftmaxOverQueries,
    Unshifted,
    UntiedByCopying,
    UntiedByLoading,
    WithinChunks,
    Wraps,
    WrongBackward,
)

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import GatedMLP


def made(kind: type[BlaGPT], build: Callable[..., BlaGPT] = tiny, **changes: object) -> BlaGPT:
    """A tiny model of another class."""
    with mock.patch("helpers.BlaGPT", kind):
        return build(**changes)


def attending(core: Callable = SDPA, edits: tuple = (qk_norm, RoPE), **changes: object) -> BlaGPT:
    """The tiny baseline with another core, or other edits of its heads."""
    return tiny(block=block(attention=attention(core=core, edits=list(edits))), **changes)


def mixing(mlp: Callable) -> BlaGPT:
    """The tiny baseline with another channel mixer."""
    return tiny(block=block(mlp=mlp))


sgd = partial(torch.optim.SGD, lr=1.0)

stuck = partial(torch.optim.AdamW, lr=1e-12)


@dataclass(frozen=True)
class Bug:
    """A planted bug.

    Attributes:
        build: a model that has it.
        broken: each promise that it must break, and a pattern of what is said.
        sound: the model without it.
        clip: the norm that gradients are clipped to, where that is the bug.
    """

    build: Callable[[], BlaGPT]
    broken: dict[str, str]
    sound: Callable[[], BlaGPT] = tiny
    clip: float | None = None


FUTURE = r"looks into the future: output \d+ moves"

FLOWS = r"logits \d+ have a gradient by token \d+"

LEAK = {"causality": FUTURE, "gradient causality": FLOWS}

dropping = partial(attending, partial(SDPA, dropout=0.1))

ZOO: dict[str, Bug] = {
    "mask off by one": Bug(
        partial(attending, OffByOne),
        {**LEAK, "prefix": "outputs differ by .* when nothing follows"},
    ),
    "mask lost under dropout": Bug(
        partial(attending, partial(MaskLostUnderDropout, dropout=0.1)),
        {
            "causality": f"train mode, 13 tokens: {FUTURE}",
            "gradient causality": f"train mode: {FLOWS}",
            "fresh data": "trained on fresh random tokens: loss",
        },
        dropping,
    ),
    "bidirectional within chunks of 8": Bug(partial(attending, WithinChunks), LEAK),
    "leak at a chunk's edge": Bug(partial(attending, AcrossAnEdge), LEAK),
    "leak beyond the first chunk of 32": Bug(
        partial(attending, partial(SecondChunk, chunk=32), vocab_size=128, context=64),
        {"causality": f"47 tokens: {FUTURE}", "gradient causality": FLOWS},
        partial(attending, vocab_size=128, context=64),
    ),
    "softmax over the queries": Bug(partial(attending, SoftmaxOverQueries), LEAK),
    "shift that wraps around": Bug(
        partial(attending, edits=(qk_norm, RoPE, Wraps)),
        {"causality": f"{FUTURE} by .* with input 12", "gradient causality": FLOWS},
        partial(attending, edits=(qk_norm, RoPE, KVShift)),
    ),
    "convolution padded on both sides": Bug(lambda: tiny(block=block(attention=Convolution)), LEAK),
    "pooled groups not shifted": Bug(lambda: tiny(block=block(attention=Unshifted)), LEAK),
    "chosen by the whole sequence": Bug(
        partial(mixing, partial(ExpertChoice, activation=SiLU, ratio=2)), {"causality": FUTURE, "prefix": "differ by"}
    ),
    "norm over the sequence": Bug(partial(tiny, norm=OverTime), LEAK),
    "norm over the batch": Bug(
        partial(tiny, norm=OverTheBatch), {"batch": "sequence 0 of a batch differs by .* from the same sequence alone"}
    ),
    "statistics that move in evaluation": Bug(
        partial(tiny, norm=RunningStatistics),
        {"batch": "alone|outlives a batch", "no memory": "something outlives a batch"},
    ),
    "a whisper of the future": Bug(partial(made, Whisper), LEAK),
    "the future of the next sequence": Bug(partial(made, NextRow), {"batch": "same sequence alone"}),
    "average of the batch": Bug(partial(made, AverageOfTheBatch), {"batch": "same sequence alone"}),
    "deaf to the first token": Bug(partial(made, Deaf), {"responsiveness": "no output moves with input 0"}),
    "input shifted as if it were targets": Bug(
        partial(made, ShiftedInput),
        {"responsiveness": "logits 0, which predict token 1, do not move with token 0|input 22"},
    ),
    "window shorter than claimed": Bug(
        partial(attending, ShortWindow), {"long memory": r"token 0 moves no logits after \d+, of 32"}
    ),
    "positions from the end": Bug(
        partial(tiny_gpt2, positions=FromTheEnd),
        {"prefix": "outputs differ by .* when nothing follows", "generate": "below the likeliest"},
        tiny_gpt2,
    ),
    "RoPE with an offset": Bug(
        partial(attending, edits=(qk_norm, KeysFromTheEnd)), {"prefix": "outputs differ by .* when nothing follows"}
    ),
    "positions restarted in generation": Bug(
        partial(made, Restarts, tiny_gpt2), {"generate": "below the likeliest of forward"}, tiny_gpt2
    ),
    "sampled from elsewhere": Bug(partial(made, ReadsElsewhere), {"generate": "below the likeliest of forward"}),
    "mask of the first call": Bug(
        partial(attending, MaskOfTheFirstCall), {"no memory": "after a shorter batch", **LEAK}
    ),
    "table of the first call": Bug(partial(attending, BiasOfTheFirstCall), {"no memory": "something outlives a batch"}),
    "a state that outlives a batch": Bug(partial(made, Remembers), {"no memory": "something outlives a batch"}),
    "dropout in evaluation": Bug(
        partial(mixing, DropsInEvaluation),
        {
            "runs": "in eval mode, 13 tokens: the same input gives .* randomness in evaluation",
            "batch": "sequence alone",
        },
        partial(tiny, block=block(dropout=0.1)),
    ),
    "targets off by one": Bug(partial(made, Rolled), {"objective": "next-token loss"}),
    "targets shifted twice": Bug(partial(made, DoubleShift), {"objective": "next-token loss"}),
    "divided by all targets": Bug(partial(made, CountsAll), {"objective": "next-token loss"}),
    "mean of means": Bug(partial(made, MeanOfMeans), {"objective": "next-token loss"}),
    "objective told the target": Bug(
        partial(made, Peeks), {"objective": "next-token loss", "fresh data": "trained on fresh random tokens"}
    ),
    "another ruler": Bug(partial(made, LongerRuler), {"ruler": "nats a token"}),
    "ruler over all targets": Bug(partial(made, RulerOfAll), {"ruler": "nats a token"}),
    "a wild start": Bug(
        partial(tiny, init=GPT2Init(zero_outputs=False, std=1.0)),
        {"first loss": r"first loss \d+\.\d+, but ln V = 4\.111"},
    ),
    "head masked to zero": Bug(
        partial(attending, SilentHead), {"gradients": r"no gradient reaches .*attention.* at 8 of \d+ places"}
    ),
    "queries never used": Bug(
        partial(attending, BorrowedQueries, edits=(RoPE,)),
        {"gradients": r"qkv\.weight .* at 8 of 64 places of dimension 0: 8, 9"},
        partial(attending, edits=(RoPE,)),
    ),
    "values without a gradient": Bug(
        partial(attending, CutValues), {"gradients": r"qkv\.weight .* at 16 of 64 places of dimension 0: 48, 49"}
    ),
    "a parameter that nothing reads": Bug(partial(made, Unused), {"gradients": "no gradient reaches gain"}),
    "a gradient that is no number": Bug(
        partial(mixing, partial(GatedMLP, activation=NotANumber, ratio=2)), {"gradients": "is not finite"}
    ),
    "nothing is learnt": Bug(partial(made, NothingButBias), {"overfits": "2 sequences still have a loss of"}),
    "tied weight counted twice": Bug(
        partial(tiny, head=CountedTwice),
        {"parameters": "embedding.weight and head.weight are two parameters in one memory"},
    ),
    "untied by loading": Bug(partial(tiny, head=UntiedByLoading), {"state dict": "tied tensors were .* became none"}),
    "untied by copying": Bug(partial(tiny, head=UntiedByCopying), {"ties": "tied tensors were .* became none"}),
    "parameters without a role": Bug(partial(made, WithoutRole), {"roles": "has no role", "optimizer": "no role for"}),
    "a parameter in two groups": Bug(partial(made, InTwoGroups), {"optimizer": r"embedding\.weight 2 times"}),
    "parameters in no group": Bug(partial(made, Forgotten), {"optimizer": "the optimizer has no .*: it is trainable"}),
    "a checkpoint that grows": Bug(
        partial(made, GrowingBuffer), {"state dict": "positions_seen depends on what was run"}
    ),
    "state drawn anew": Bug(partial(made, DrawnAnew), {"state dict": "logits differ after a round trip"}),
    "an item in a region": Bug(
        partial(mixing, partial(AsksTheData, activation=SiLU, ratio=2)), {"compiled": "a region is not one graph"}
    ),
    "another path when compiled": Bug(
        partial(mixing, partial(AnotherWhenCompiled, activation=SiLU, ratio=2)),
        {"compiled": "away from eager"},
    ),
    "softmax in half": Bug(partial(attending, SoftmaxInHalf), {"bf16": "objective (nan|inf)|is not finite"}),
    "micro-batches added": Bug(
        partial(made, SumOfMicroBatches), {"accumulation": "differs by .* from that of the objective"}
    ),
    "micro-batches weighed": Bug(
        partial(made, LastWeighsMore), {"accumulation": "differs by .* from that of the objective"}
    ),
    "a generator of its own": Bug(
        partial(mixing, OwnGenerator),
        {"runs": "in train mode, .* that the seed does not set", "resume": "after resuming at step 2"},
        partial(tiny, block=block(dropout=0.1)),
    ),
    "a clip that throttles": Bug(
        partial(tiny, optimizer=sgd),
        {"optimizer": r"trainer.gradient_clip_val=0.001 throttles"},
        partial(tiny, optimizer=sgd),
        clip=1e-3,
    ),
    "an optimizer that clips itself": Bug(
        partial(tiny, optimizer=partial(ClipsItself, lr=3e-3)), {"optimizer": "throttled"}
    ),
    "an optimizer with a generator of its own": Bug(
        partial(tiny, optimizer=partial(AddsNoise, lr=3e-3)), {"resume": "generator of its own"}
    ),
    "an optimizer that skips tall matrices": Bug(
        partial(tiny, optimizer=partial(SkipsTallMatrices, lr=3e-3)),
        {"optimizer": "does not move in 8 steps, although"},
    ),
    "a learning rate of nothing": Bug(partial(tiny, optimizer=stuck), {"optimizer": "throttled|does not move"}),
    "leak at multiples of 16": Bug(partial(attending, OnMultiples, context=64), {"causality": f"48 tokens: {FUTURE}"}),
    "mask lost in bfloat16": Bug(
        partial(attending, MaskLostInHalf, edits=()), {"causality": f"bfloat16: {FUTURE}"}, partial(attending, edits=())
    ),
    "a key that all later tokens miss": Bug(
        partial(attending, EdgeForgotten), {"long memory": "no logits after 7 move with token 7"}
    ),
    "a gradient cut short": Bug(
        partial(mixing, partial(CutShort, activation=SiLU, ratio=2)), {"slopes": "along embedding.weight by"}
    ),
    "a backward three times too large": Bug(
        partial(mixing, partial(WrongBackward, activation=SiLU, ratio=2)), {"slopes": "but its gradient says"}
    ),
    "a frozen weight": Bug(partial(mixing, Frozen), {"gradients": "gate_up.weight is frozen"}),
    "a plain list of modules": Bug(partial(mixing, InAList), {"gradients": "4 trainable tensors are no parameters"}),
    "another total": Bug(partial(made, AnotherTotal), {"objective": "minimises .* but the numbers it gives"}),
    "targets of token 0 left out": Bug(partial(made, WithoutPad), {"objective": "next-token loss"}),
    "mean of batches": Bug(partial(made, MeanOfBatches), {"ruler": "validation_step: val/loss"}),
    "another temperature": Bug(partial(made, AnotherTemperature), {"generate": "next_logits: differ"}),
    "positions restarted, tied head": Bug(
        partial(made, Restarts), {"generate": "next_logits: differ .* given 5 tokens"}
    ),
    "all are vectors": Bug(partial(made, AllVectors), {"roles": "is no vector"}),
    "an optimizer that climbs": Bug(
        partial(tiny, optimizer=partial(torch.optim.AdamW, lr=3e-3, maximize=True)),
        {"optimizer": "moves along its gradient, not against it"},
    ),
    "a rate that no schedule reaches": Bug(
        partial(tiny, optimizer=partial(FixedRate, lr=0.1)),
        {"optimizer": "at a tenth of the learning rate: the schedule does not reach it"},
        partial(tiny, optimizer=partial(torch.optim.SGD, lr=0.1)),
    ),
    "excused from nothing": Bug(partial(made, Misdeclared), {"declarations": "'longmemory' is no promise"}),
    "everybody's dice": Bug(partial(made, Reseeds), {"runs": "in train mode, 13 tokens: forward sets the global seed"}),
    "tokens written into": Bug(partial(made, WritesTokens), {"runs": "the tokens are written into"}),
    "an overflow at one position": Bug(
        partial(made, InfiniteAtTwenty), {"runs": "23 tokens: logits 20 are not finite"}
    ),
}
