"""BlaGPT: the decoder-only transformer whose every part is a socket.

Source   Radford et al. 2019 (GPT-2) for the frame; what it is made of is said in its configuration
Formula  x = E[tokens], normed where asked for (+ positions);  x ← block_l(x) for each l;  features = norm(x) (+ E_b[tokens])
Cost     that of its parts
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site, built
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.nn.states import States
from blagpt_pl.token_model import TokenModel


class BlaGPT(TokenModel):
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
        embedding_norm: normalisation of the token embeddings, before positions and the first block; none by default.
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
    continues: ClassVar[bool] = True

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
        embedding_norm: NormFactory | None = None,
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
        self.begin(d_model, dropout, n_layers=n_layers)
        site = Site(d_model, n_layers, 0, vocab_size, context)
        self.embedding_norm = None if embedding_norm is None else built("model.embedding_norm", embedding_norm, d_model)
        self.positions = None if positions is None else positions(site)
        self.blocks = stack("model.block", block, site)
        self.end(replace(site, layer=n_layers - 1), block, norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return self.blocks

    def trunk(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, Carry]:
        self.check_length(tokens)
        x = self.embedding(tokens)  # (B, T, D)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.positions is not None:
            x = x + self.positions(tokens)
        x = self.drop(x)
        carry = Carry(tokens, x, states=states)
        return through(self.blocks[:-1], x, carry), carry

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.blocks[-1] if block is None else block
        return self.ended(last(x, carry), carry.tokens)
