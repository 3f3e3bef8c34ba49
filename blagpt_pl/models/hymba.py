"""Hymba: attention and Mamba in parallel in every layer, most of them local, behind learned tokens that all of them read.

Source   Dong et al. 2024, "Hymba: A Hybrid-head Architecture for Small Language Models", arXiv:2411.13676
Formula  x = [R_1 ... R_M, E[tokens]];  x ← block_l(x), whose mixer is `HymbaMixer`, global or local as `order` says;
         features = norm(x_{M+1} ...) (+ E_b[tokens]);  positions are those of [R, tokens]
Causal   the meta tokens R come before all text, and are the same for every text. They are dropped before the norm, and are in no loss
Beside   parts are told of a context of M + T positions; of the tokens beside the stream the first M are 0, and stand for none
Cost     M D weights; all blocks run over M + T positions: 1 + M / T of what they cost without
"""

from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, Site
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.checks import at_least_one
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.recurrent.parallel_heads import GLOBAL, LOCAL, HybridSite, HymbaMixer
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.nn.states import Remembered, States
from blagpt_pl.token_model import TokenModel


class Behind(States):
    """The states of a piece, for parts to which more positions came before it than tokens of the text.

    Args:
        states: of the piece.
        more: how many more.
    """

    def __init__(self, states: States, more: int) -> None:
        super().__init__(states.start + more)
        self.states = states

    def take(self) -> Remembered | None:
        return self.states.take()

    def leave(self, *tensors: Tensor, grows: bool = False) -> None:
        self.states.leave(*tensors, grows=grows)


class Hymba(TokenModel):
    """Learned meta tokens, then blocks whose attention and Mamba run in parallel, a few of them global.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of the residual stream.
        order: a letter for each layer: g, attention reads all that came before; l, it reads a window and the meta tokens.
        n_meta: M, learned tokens before the text.
        block: what is repeated; its mixer is `HymbaMixer`.
        norm: normalisation after the last block.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings, meta tokens included, in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of block by block.

    Raises:
        ValueError: an order of other letters or without a global layer, no meta token, or a block with another mixer.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "order": "pattern",
        "vocab_size": "vocabulary",
        "context": "tokens",
        "n_meta": "tokens",
    }
    continues: ClassVar[bool] = True

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        order: str,
        n_meta: int,
        block: BlockFactory,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        losses: list[LossTermFactory] | None = None,
        token_bias: bool = False,
        dropout: float = 0.0,
        compile: str | None = None,
        memory: MemoryPolicy | None = None,
        loss: LossName = "chunked",
        whole_graph: bool = False,
    ) -> None:
        super().__init__(vocab_size, context, optimizer, schedule, compile, loss, memory, whole_graph)
        if set(order) - {GLOBAL, LOCAL} or GLOBAL not in order:
            raise ValueError(
                f"model.order: {order!r} (expected g and l, one a layer, such as gllg, and one g at least)"
            )
        at_least_one("model.n_meta", n_meta)
        self.begin(d_model, dropout)
        self.n_meta = n_meta
        self.meta = nn.Embedding(n_meta, d_model)  # R

        def placed(site: Site) -> Block:
            """A block at a site of the text, told of the meta tokens before it."""
            facts = asdict(replace(site, context=site.context + n_meta))
            return block(HybridSite(**facts, order=order, meta=n_meta))

        site = Site(d_model, len(order), 0, vocab_size, context)
        self.blocks = stack("model.block", placed, site)
        for i, one in enumerate(self.blocks):
            if not any(isinstance(part, HymbaMixer) for part in one.modules()):
                raise ValueError(
                    f"model.block: no HymbaMixer in layer {i}, and model.order would say nothing (expected it as "
                    "block.attention); fix: model.class_path: BlaGPT for other mixers"
                )
        self.end(replace(site, layer=len(order) - 1), placed, norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return self.blocks

    def trunk(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, Carry]:
        self.check_length(tokens)
        x = self.embedding(tokens)  # (B, T, D)
        if states is None or not states.start:
            x = torch.cat((self.meta.weight.expand(len(x), -1, -1), x), dim=1)  # (B, M + T, D)
            tokens = F.pad(tokens, (self.n_meta, 0))
        else:
            states = Behind(states, self.n_meta)
        x = self.drop(x)
        carry = Carry(tokens, x, states=states)
        return through(self.blocks[:-1], x, carry), carry

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.blocks[-1] if block is None else block
        x, first = last(x, carry), 0 if carry.start else self.n_meta
        return self.ended(x[:, first:], carry.tokens[:, first:])
