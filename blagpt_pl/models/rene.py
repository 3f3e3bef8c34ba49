"""Rene: a stack of blocks with one mixer each, whose kinds a word sets: Mamba-2, attention without positions, MLP.

Source   Cartesia 2024, "Rene", its code and model card (github.com/cartesia-ai/edge; no paper); before it Dao & Gu 2024,
         "Transformers are SSMs", arXiv:2405.21060, §9.2.3: Mamba-2 with a few attention layers and MLPs
Formula  x = E[tokens];  x ← x + part_l(norm(x)), part_l a mixer of the kind that letter l of `order` names;
         features = norm(x) (+ E_b[tokens])
Differs  the stream has the dtype of the run, not always float32
Cost     that of its parts, and one norm a layer
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.base import Carry, ChannelMixerFactory, HeadFactory, Init, NormFactory, SequenceMixerFactory, Site
from blagpt_pl.nn.block import SoloBlock
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.order import check_letters, check_sockets
from blagpt_pl.nn.stack import through
from blagpt_pl.nn.states import States
from blagpt_pl.token_model import TokenModel


class Rene(TokenModel):
    """Blocks of one mixer each, in a given order: Mamba-2, attention, MLP.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of the stream.
        order: one letter a layer: m (`mamba`), a (`attention`), f (`mlp`).
        norm: normalisation of every part's input, and after the last block.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        mamba: the part of layers m; None where there is none.
        attention: of layers a.
        mlp: of layers f.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of block by block.

    Raises:
        ValueError: an unknown letter, one without its part, or a part without its letter.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "order": "pattern",
        "vocab_size": "vocabulary",
        "context": "tokens",
    }
    continues: ClassVar[bool] = True

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        order: str,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        mamba: SequenceMixerFactory | None = None,
        attention: SequenceMixerFactory | None = None,
        mlp: ChannelMixerFactory | None = None,
        losses: list[LossTermFactory] | None = None,
        token_bias: bool = False,
        dropout: float = 0.0,
        compile: str | None = None,
        memory: MemoryPolicy | None = None,
        loss: LossName = "chunked",
        whole_graph: bool = False,
    ) -> None:
        super().__init__(vocab_size, context, optimizer, schedule, compile, loss, memory, whole_graph)
        sockets = {"m": ("mamba", mamba), "a": ("attention", attention), "f": ("mlp", mlp)}
        check_letters(order, {letter: f"model.{socket}" for letter, (socket, _) in sockets.items()})
        check_sockets(order, sockets)
        self.begin(d_model, dropout)
        self.order = order
        site = Site(d_model, len(order), 0, vocab_size, context)
        blocks = {letter: partial(SoloBlock, norm=norm, part=part) for letter, (_, part) in sockets.items()}
        self.blocks = nn.ModuleList(blocks[letter](replace(site, layer=i)) for i, letter in enumerate(order))
        last = replace(site, layer=len(order) - 1)
        self.end(last, blocks[order[-1]], norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return self.blocks

    def trunk(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, Carry]:
        self.check_length(tokens)
        x = self.drop(self.embedding(tokens))  # (B, T, D)
        carry = Carry(tokens, x, states=states)
        return through(self.blocks[:-1], x, carry), carry

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.blocks[-1] if block is None else block
        return self.ended(last(x, carry), carry.tokens)
