"""How long an optimizer step will take on a named device, by a roofline; a prediction that no run of ours has confirmed.

Formula  time = matrix FLOPs / (MATMUL · peak) + attention FLOPs / (ATTENTION · peak) + bytes / (BANDWIDTH · bandwidth)
                + exposed exchange of gradients, if there are several ranks; the sum, for the kernels run one after another
Bytes    PASSES over what the trunk keeps, LOGIT for each logit, WEIGHT for each parameter and micro-batch, and the optimizer's
         step: its state read and written, weights read and written, gradients read
Fitted   MATMUL, so that the first of `ANCHORS` comes out; it stands for all that is not said here
Far off  on the others, public logs of the GPT-2 124M shape: -13 % to +4 % for PyTorch scripts, with optimizers that cost more
         than AdamW, 0 % and +21 % for llm.c's kernels (tests/lab/test_predict.py computes these)
No anchor for training without compilation, other widths, lengths or devices, several machines, or gradients that are sharded
"""

from dataclasses import dataclass

from blagpt_pl.devices import Device
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.follow import TRUE, named_precision
from blagpt_pl.lab.memory import StepMemory

MATMUL = 0.632  # of the vendor's peak; fitted. 790 of 989 TFLOP/s (0.80) have been reached with large matrices
ATTENTION = 0.26  # FlashAttention-2, width 64, T = 1024, H100: 306 and 238 TFLOP/s forward and backward (the FA3 paper's figures)
BANDWIDTH = 0.9  # 4.3 of 4.8 TB/s
PASSES = 3  # what is kept for backward is written once, and read by the next operation and in backward
LOGIT = {True: 12, False: 46}  # bytes a logit, written and read: compiled body, and element by element
# bytes a parameter and micro-batch: cast (4 + 2), read twice as 16 bit (4), gradient made and added (2 + 4 + 8)
WEIGHT = 24
EXPOSED = 2.1e-11  # s a byte of gradients: 143.8 ms on 8 GPUs against 1067 / 8 on one, at 4 x 124.4 M bytes


@dataclass(frozen=True)
class Work:
    """What one optimizer step is made of.

    Attributes:
        flops_per_token: forward and backward, attention included.
        attention_flops_per_token: the part of them that is in attention's cores.
        tokens: of all ranks.
        ranks: devices.
        micro_batches: forwards a step, on one device.
        parameters: number of scalars.
        kept_per_token: bytes that the trunk keeps for backward.
        logits_per_token: V, for each time that the head is applied.
        optimizer_bytes: state of the optimizer.
        compiled: whether the loss is.
    """

    flops_per_token: int
    attention_flops_per_token: int
    tokens: int
    ranks: int
    micro_batches: int
    parameters: int
    kept_per_token: float
    logits_per_token: int
    optimizer_bytes: int
    compiled: bool = True


@dataclass(frozen=True)
class Prediction:
    """A step's time, and what it is the sum of.

    Attributes:
        step_ms: of an optimizer step.
        tokens_per_s: of all ranks.
        mfu: FLOPs of the model over the vendor's dense bf16 peak of all ranks.
        parts_ms: matmul, attention, memory, exchange.
    """

    step_ms: float
    tokens_per_s: float
    mfu: float
    parts_ms: dict[str, float]


def predict(work: Work, device: Device) -> Prediction:
    """The time of a step on one kind of device."""
    tokens = work.tokens / work.ranks
    attention = tokens * work.attention_flops_per_token
    moved = tokens * (PASSES * work.kept_per_token + LOGIT[work.compiled] * work.logits_per_token)
    moved += work.parameters * (WEIGHT * work.micro_batches + 12) + 2 * work.optimizer_bytes
    parts = {
        "matmul": (tokens * work.flops_per_token - attention) / (MATMUL * device.bf16_flops),
        "attention": attention / (ATTENTION * device.bf16_flops),
        "memory": moved / (BANDWIDTH * device.bandwidth_bytes_per_s),
        "exchange": EXPOSED * 4 * work.parameters if work.ranks > 1 else 0.0,
    }
    seconds = sum(parts.values())
    rate = work.tokens / seconds
    mfu = rate * work.flops_per_token / (device.bf16_flops * work.ranks)
    return Prediction(1e3 * seconds, rate, mfu, {name: 1e3 * part for name, part in parts.items()})


def work_of(
    memory: StepMemory, b: int, tokens: int, ranks: int, flops_per_token: int, attention_flops_per_token: int
) -> Work:
    """What a step is made of, from what was followed of its memory.

    Args:
        memory: of the model, at its context and precision.
        b: sequences a forward, on one device.
        tokens: of a step, over all ranks.
        ranks: devices.
        flops_per_token, attention_flops_per_token: as for `Work`.

    Raises:
        ConfigError: a precision whose matrix products are not of 16 bit, or sizes that do not divide.
    """
    name = named_precision(memory.precision)
    if TRUE.get(name) is not None and TRUE[name].itemsize > 2:
        raise ConfigError(
            f"trainer.precision: {memory.precision!r} (expected one of 16 bit, such as bf16-mixed: the time of others is "
            "not predicted)"
        )
    forward = b * memory.context
    if tokens % (forward * ranks):
        raise ConfigError(
            f"data.device_batch_size: {b} sequences of {memory.context} tokens on {ranks} ranks do not divide a step of "
            f"{tokens} tokens"
        )
    model = memory.model
    passes = model.head_passes + sum(term.head_passes for term in model.losses)
    return Work(
        flops_per_token=flops_per_token,
        attention_flops_per_token=attention_flops_per_token,
        tokens=tokens,
        ranks=ranks,
        micro_batches=tokens // (forward * ranks),
        parameters=sum(p.numel() for p in model.parameters()),
        kept_per_token=memory.peaks(b).kept["activations"] / forward,
        logits_per_token=passes * model.vocab_size,
        optimizer_bytes=memory.peaks(b).kept["optimizer"],
        compiled=memory.compiled,
    )


def gpt2(tokens: int, ranks: int, micro_batches: int) -> Work:
    """The step that the anchors made: GPT-2 124M with a vocabulary of 50304, T = 1024, as `StepMemory` counts configs/gpt2.yaml."""
    return Work(798_000_000, 56_600_000, tokens, ranks, micro_batches, 124_475_904, 317_208, 50304, 995_807_824)


# hardware, ranks, micro-batches, ms for 524,288 tokens, and whose log it is
ANCHORS = (
    ("H100", 8, 1, 138.6, "modded-nanogpt, records, 2024-10-29 Optimizers, Adam"),
    ("H100", 8, 1, 141.8, "modded-nanogpt, 2024-10-18, Muon"),
    ("H100", 8, 1, 146.16, "modded-nanogpt, track 3, Muon"),
    ("H200", 8, 1, 143.80, "modded-nanogpt, track 3, NorMuon"),
    ("H200", 1, 8, 1067.0, "modded-nanogpt, track 3, 2026-05-17, Muon of 12 steps"),
    ("A100-80GB", 8, 1, 348.0, "modded-nanogpt, track 3"),
    ("H100", 8, 1, 138.0, "llm.c, 475 k tokens a second and GPU"),
    ("A100-80GB", 8, 1, 300.0, "llm.c, scripts/run_gpt2_124M.sh"),
)
