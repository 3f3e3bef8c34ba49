"""BlaGPT: the decoder-only transformer whose every part is a socket.

Source   Radford et al. 2019 (GPT-2) for the frame; what it is made of is said in its configuration
Formula  x = E[tokens] (+ positions);  x ← block_l(x) for each l;  features = norm(x) (+ E_b[tokens])
Cost     that of its parts
"""

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.lm import LanguageModel, OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory, built_terms
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site, built
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.dropout import dropout as dropped
from blagpt_pl.nn.memory import MemoryPolicy

BlockFactory = Callable[[Site], Block]


class BlaGPT(LanguageModel):
    """Token embedding, blocks, final norm, head.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of the residual stream.
        n_layers: number of blocks.
        block: what is repeated.
        norm: normalisation after the last block.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        positions: added to the token embeddings; none by default.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of block by block.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "n_layers": "layers",
        "vocab_size": "vocabulary",
        "context": "tokens",
    }

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        n_layers: int,
        block: BlockFactory,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        positions: PositionsFactory | None = None,
        losses: list[LossTermFactory] | None = None,
        token_bias: bool = False,
        dropout: float = 0.0,
        compile: str | None = None,
        memory: MemoryPolicy | None = None,
        loss: LossName = "chunked",
        whole_graph: bool = False,
    ) -> None:
        super().__init__(vocab_size, context, optimizer, schedule, compile, loss, memory, whole_graph)
        for name, value in {"vocab_size": vocab_size, "d_model": d_model, "n_layers": n_layers}.items():
            if value < 1:
                raise ValueError(f"model.{name}: {value} (expected 1 or more)")
        sites = [Site(d_model, n_layers, layer, vocab_size, context) for layer in range(n_layers)]
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.positions = None if positions is None else positions(sites[0])
        self.drop = dropped("model.dropout", dropout)
        self.blocks = nn.ModuleList(built("model.block", block, site) for site in sites)
        self.norm = built("model.norm", norm, d_model)
        self.head = built("model.head", head, sites[0], self.embedding)
        with torch.random.fork_rng(
            devices=[]
        ):  # additions come last and draw apart: the rest starts as it does without
            self.token_bias = nn.Embedding(vocab_size, d_model) if token_bias else None
            terms = built_terms(losses or [], sites[-1], block)
        del self.losses
        self.losses = nn.ModuleList(terms)
        init(self, sites[0])

    def regions(self) -> Iterable[nn.Module]:
        return self.blocks

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens: {tokens.shape[1]} a sequence (context {self.context}); fix: data.context or shorter input"
            )
        x = self.embedding(tokens)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(tokens)
        x = self.drop(x)
        carry = Carry(tokens, x)
        for block in self.blocks[:-1]:
            x = block(x, carry)
        return x, carry

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.blocks[-1] if block is None else block
        x = self.norm(last(x, carry))
        return x if self.token_bias is None else x + self.token_bias(carry.tokens)

    def readout(self) -> Iterable[nn.Module]:
        return [m for m in (self.norm, self.token_bias, self.head) if m is not None]
