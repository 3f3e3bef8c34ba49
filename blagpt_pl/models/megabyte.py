"""MegaByte: a large model over patches of P tokens, and a small one that spells out each patch.

Source   Yu et al. 2023, "MEGABYTE: Predicting Million-byte Sequences with Multiscale Transformers", arXiv:2305.07185, §2
Formula  places s = 0 ... T hold the tokens x_s; place s is slot j = s mod P of patch k = s // P, and its output predicts x_s
         global   h_k = concat_j E_g[x_{(k-1)P + j}], h_0 a learned vector;  g = blocks(h) (K, D): g_k knows the patches before k
         local    l_{k,0} = p, a learned vector;  l_{k,j} = E[x_{kP + j - 1}];  l_{k,j} += W g_k[j], the j-th of P slices of g_k
                  y_k = blocks(l_k), every patch a sequence of its own
         features_t = norm(y at place t + 1), which knows x_0 ... x_t: those of its own patch by the local model, the rest by g
Places   the paper's model predicts x_0 as well, from nothing; that place is computed, for the other slots of its patch read it,
         and left out. So K = T // P + 1 patches serve T predictions, and nothing is padded but the end of the last patch
Differs  what the blocks are made of is said in the configuration, positions too. The local table is the one that a tied head reads
Cost     a block of the global model once a patch, one of the local model once a token (and P tokens more); attention over T / P
         positions, and over P
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.embed import StartVector
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.token_model import TokenModel


class MegaByte(TokenModel):
    """Patches, a global model over them, a local model within each.

    Args:
        vocab_size: V, rows of the tables, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of the global stream: `patch` times the width of a token in it.
        d_local: width of the local stream, and of the features.
        patch: P, tokens of a patch.
        n_layers: blocks of the global model.
        n_local_layers: blocks of the local model.
        block: what is repeated.
        norm: normalisation after the last block.
        head: from features to logits; a tied one reads the local table.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        local_block: what is repeated in the local model; `block` by default.
        positions: added to both streams, of patches and of slots; none by default.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of block by block.

    Raises:
        ValueError: a patch that is no patch, that no two of fit into the context, or whose tokens do not share the width evenly.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "d_local": "width",
        "n_layers": "layers",
        "n_local_layers": "layers",
        "vocab_size": "vocabulary",
        "context": "tokens",
    }

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        d_local: int,
        patch: int,
        n_layers: int,
        n_local_layers: int,
        block: BlockFactory,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        local_block: BlockFactory | None = None,
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
        if not 2 <= patch <= context // 2:
            raise ValueError(
                f"model.patch: {patch} (expected 2 or more, and two patches within the context of {context})"
            )
        if d_model % patch:
            raise ValueError(
                f"model.d_model: {d_model} does not split into {patch} tokens; fix: a multiple of model.patch"
            )
        self.begin(d_local, dropout, d_local=d_local, d_model=d_model, n_layers=n_layers, n_local_layers=n_local_layers)
        self.patch = patch
        count = n_layers + n_local_layers
        coarse = Site(d_model, count, 0, vocab_size, context // patch + 1)
        fine = Site(d_local, count, 0, vocab_size, patch)
        width = d_model // patch  # of a token in the global stream, and of a slice of it
        self.patch_embedding = nn.Embedding(vocab_size, width)
        self.patch_start, self.start = StartVector(d_model), StartVector(d_local)
        self.positions, self.local_positions = (
            None if positions is None else positions(site) for site in (coarse, fine)
        )
        self.blocks = stack("model.block", block, coarse, range(n_layers))
        self.spread = nn.Linear(width, d_local, bias=False)
        within, socket = (block, "model.block") if local_block is None else (local_block, "model.local_block")
        self.local_blocks = stack(socket, within, fine, range(n_layers, count))

        def in_patches(site: Site) -> Block:
            return within(replace(site, context=patch))

        # terms and head see the sequence, blocks in the last one's place a patch
        self.end(replace(fine, layer=count - 1, context=context), in_patches, norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return [*self.blocks, *self.local_blocks]

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        """(B, T) -> the local stream (B K, P, d_local), every patch a sequence; the memo holds `tokens` as they were given."""
        self.check_length(tokens)
        patches, size = tokens.shape[1] // self.patch + 1, self.patch  # K, P
        known = F.pad(tokens, (1, patches * size - 1 - tokens.shape[1]))  # (B, K P): at place s the token before it
        g = self.global_stream(tokens, known[:, ::size]).unflatten(-1, (size, -1))  # (B, K, P, D / P)
        x = self.embedding(tokens)  # (B, T, d_local)
        x = F.pad(x, (0, 0, 0, patches * size - x.shape[1])).unflatten(1, (-1, size))  # (B, K, P, d_local)
        x = self.start(x[:, :, :-1]) + self.spread(g)
        x = x.flatten(0, 1)  # (B K, P, d_local)
        within = known.view(-1, size)  # (B K, P)
        if self.local_positions is not None:
            x = x + self.local_positions(within)
        x = self.drop(x)
        carry = Carry(within, x, {"tokens": tokens})
        return through(self.local_blocks[:-1], x, carry), carry

    def global_stream(self, tokens: Tensor, known: Tensor) -> Tensor:
        """(B, T) tokens, and (B, K) the last token that each patch's position knows -> (B, K, D)."""
        whole = tokens[:, : (known.shape[1] - 1) * self.patch]  # of whole patches, the first K - 1
        x = self.patch_embedding(whole).unflatten(1, (-1, self.patch)).flatten(2)  # (B, K - 1, D)
        x = self.patch_start(x)  # (B, K, D): position k holds patch k - 1
        if self.positions is not None:
            x = x + self.positions(known)
        x = self.drop(x)
        return through(self.blocks, x, Carry(known, x))

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.local_blocks[-1] if block is None else block
        tokens = carry.memo["tokens"]
        y = last(x, carry).reshape(len(tokens), -1, x.shape[-1])  # (B, K P, d_local)
        return self.ended(y[:, 1 : tokens.shape[1] + 1], tokens)  # place t + 1 predicts x_{t+1}
