"""Zamba2: Mamba-2 layers, before some of which a transformer block runs that is shared by all, or two by turns.

Source   Glorioso et al. 2024, "The Zamba2 Suite: Technical Report", arXiv:2411.15242, §2.1; equations as in transformers'
         `Zamba2ForCausalLM`
Formula  x = E[tokens], x0 = x.  Layer m: x ← x + mamba(norm(x)).  Layer g, the i-th of them: s = shared_{i mod n}(x, x0) with the
         i-th adapters;  x ← x + mamba(norm(x + W_i s)).  features = norm(x) (+ E_b[tokens])
Cost     that of its parts; the shared block's weights once, its FLOPs at every g
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.adapters import Adapters
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, SequenceMixerFactory, Site, built
from blagpt_pl.nn.block import SoloBlock
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.order import check_letters
from blagpt_pl.nn.shared_block import SHARED, SharedBlockFactory, TakingUp
from blagpt_pl.nn.states import States
from blagpt_pl.token_model import TokenModel


class Zamba2(TokenModel):
    """Mamba-2 layers, and shared transformer blocks that speak before some of them.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of the stream.
        order: one letter a layer: m (Mamba-2), g (Mamba-2 with a shared block before it).
        mamba: what all layers are.
        shared: the block that is shared.
        n_shared: how many there are; they take turns.
        adapter_rank: r, of the maps that each use adds to those of its block.
        norm: normalisation of every layer's input, and after the last one.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        losses: what training minimises beside the next-token loss; nothing by default. Further heads are layers m.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings in training.
        compile: backend of torch.compile for the regions and the loss, or None to run eagerly.
        memory: what the regions recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of region by region.

    Raises:
        ValueError: an unknown letter, no g, or more shared blocks than there are of them.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "order": "pattern",
        "adapter_rank": "width",
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
        mamba: SequenceMixerFactory,
        shared: SharedBlockFactory,
        n_shared: int,
        adapter_rank: int,
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
        check_letters(order, {"m": "model.mamba", "g": "model.shared before model.mamba"})
        self.begin(d_model, dropout, n_shared=n_shared)
        self.order = order
        uses = [layer for layer, letter in enumerate(order) if letter == "g"]
        if n_shared > len(uses):
            raise ValueError(
                f"model.n_shared: {n_shared}, but {len(uses)} layers of model.order {order!r} are g: a block would never be used "
                "(expected at most as many); without any g it is BlaGPT with SoloBlock"
            )
        site = Site(d_model, len(order), 0, vocab_size, context)
        kinds = {"m": partial(SoloBlock, norm=norm, part=mamba), "g": partial(TakingUp, norm=norm, mixer=mamba)}
        self.layers = nn.ModuleList(kinds[letter](replace(site, layer=i)) for i, letter in enumerate(order))
        self.shared = nn.ModuleList(built("model.shared", shared, replace(site, layer=i)) for i in uses[:n_shared])
        self.adapters = nn.ModuleList(Adapters(self.shared[0].maps(), adapter_rank) for _ in uses)
        self.use = {layer: i for i, layer in enumerate(uses)}  # which use it is, by its layer
        self.end(replace(site, layer=len(order) - 1), kinds["m"], norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return [*self.layers, *self.shared, *self.adapters]

    def trunk(self, tokens: Tensor, states: States | None = None) -> tuple[Tensor, Carry]:
        self.check_length(tokens)
        x = self.drop(self.embedding(tokens))  # (B, T, D)
        carry = Carry(tokens, x, states=states)
        for i in range(len(self.layers) - 1):
            x = self.layer(i, x, carry)
        return x, carry

    def layer(self, i: int, x: Tensor, carry: Carry) -> Tensor:
        """The stream through layer i: (B, T, D) -> (B, T, D)."""
        use = self.use.get(i)
        if use is None:
            return self.layers[i](x, carry)
        maps = self.adapters[use](x, carry)
        carry.memo[SHARED] = self.shared[use % len(self.shared)](x, carry.but(memo=maps))  # (B, T, D)
        y = self.layers[i](x, carry)
        del carry.memo[SHARED]
        return y

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        y = self.layer(len(self.layers) - 1, x, carry) if block is None else block(x, carry)
        return self.ended(y, carry.tokens)
