"""Hourglass: a transformer whose stream is shortened on the way in and lengthened again on the way out.

Source   Nawrot et al. 2021, "Hierarchical Transformers Are More Efficient Language Models", arXiv:2110.13711, Algorithm 1
Formula  hourglass(x, [k, *factors]):  x ← blocks(x);  c = pool(x shifted right by k - 1, zeros first; groups of k);
         c ← hourglass(c, factors), or blocks(c) where no factor is left;  x ← x + upsample(x, norm(c));  x ← blocks(x)
Causal   with the shift group i holds x_{ik - k + 1} ... x_{ik}, and is read by x_{ik} ... x_{ik + k - 1}. One place less, and x_{ik}
         would know x_{ik + 1}. What is added to is the stream as it was, unshifted
Lengths  T is no multiple of k: the last group is the last that is complete, ceil(T / k) of them with the zeros; what is written past
         the end is cut off
Differs  the norm of c is from the authors' code. All levels have one width; positions are those of each level's own grid. Streams do not
         see each other's memo; the carry of a coarse one has as tokens the last that each group knows
Cost     a block of a coarse stream once a group; attention over T / k positions there
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate
from math import prod
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site, built
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.pooling import PoolFactory, late_groups
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.nn.upsampling import UpsampleFactory
from blagpt_pl.token_model import TokenModel

COARSE = "coarse"  # what `Lengthen` reads beside its own stream


class Shorten(nn.Module):
    """x (B, T, D) -> (B, S, D), S = ceil(T / k): group i is pooled from positions ik - k + 1 to ik.

    Args:
        site: of the stream that it makes.
        factor: k.
        pool: how a group becomes one vector.
    """

    def __init__(self, site: Site, factor: int, pool: PoolFactory) -> None:
        super().__init__()
        self.factor = factor
        self.pool = built("model.pool", pool, site, factor)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.pool(late_groups(x, self.factor), carry.tokens[:, :: self.factor])


class Lengthen(nn.Module):
    """x (B, T, D), and in the memo the coarse stream (B, S, D) -> (B, T, D): adds to each position what its group knows.

    The signature is a block's, so that whatever is done to blocks can be done to it.

    Args:
        site: of the stream that it writes into.
        factor: k.
        upsample: how positions read the coarse stream.
        norm: of the coarse stream.
    """

    def __init__(self, site: Site, factor: int, upsample: UpsampleFactory, norm: NormFactory) -> None:
        super().__init__()
        self.factor = factor
        self.norm = built("model.norm", norm, site.d_model)
        self.upsample = built("model.upsample", upsample, site, factor)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        coarse, length = self.norm(carry.memo[COARSE]), x.shape[1]
        whole, tokens, beyond = x, carry.tokens, coarse.shape[1] * self.factor - length
        if beyond:
            whole, tokens = F.pad(x, (0, 0, 0, beyond)), F.pad(tokens, (0, beyond))
        return x + self.upsample(whole, coarse, tokens)[:, :length]


class Hourglass(TokenModel):
    """Blocks at full length, at one or several shorter ones, and back.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of all streams.
        n_layers: numbers of blocks from the outside in and out again, such as [3, 9, 3] or [1, 2, 8, 2, 1]; the last at least 1.
        factors: by what the stream is shortened, from the outside in: one for each time.
        block: what is repeated.
        pool: how a group becomes one vector.
        upsample: how positions read the vectors of groups.
        norm: normalisation after the last block, and of every coarse stream before it is upsampled.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        positions: added to the token embeddings; none by default.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings in training.
        compile: backend of torch.compile for the regions and the loss, or None to run eagerly.
        memory: what the regions recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of region by region.

    Raises:
        ValueError: factors that shorten nothing or leave nothing, numbers of blocks that do not go with them.
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
        n_layers: list[int],
        factors: list[int],
        block: BlockFactory,
        pool: PoolFactory,
        upsample: UpsampleFactory,
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
        check_shape(n_layers, factors, context)
        self.begin(d_model, dropout)
        self.factors, folds = tuple(factors), len(factors)
        sites = [Site(d_model, sum(n_layers), 0, vocab_size, context)]  # of each level's stream
        for factor in factors:
            sites.append(replace(sites[-1], context=-(-sites[-1].context // factor)))
        first = [0, *accumulate(n_layers)]  # block of each stack
        self.positions = None if positions is None else positions(sites[0])
        self.stacks = nn.ModuleList(
            stack("model.block", block, sites[min(i, 2 * folds - i)], range(first[i], first[i + 1]))
            for i in range(len(n_layers))
        )
        self.shorten = nn.ModuleList(
            Shorten(replace(sites[i + 1], layer=first[i + 1]), factor, pool) for i, factor in enumerate(factors)
        )
        self.lengthen = nn.ModuleList(
            Lengthen(replace(sites[i], layer=first[2 * folds - i]), factor, upsample, norm)
            for i, factor in enumerate(factors)
        )
        if folds > 2:  # `Init`s that start outputs at 0 let one level after the other begin to learn
            self.exempt = {"gradients": f"where outputs start at 0, the innermost blocks learn after {folds + 1} steps"}
        self.end(replace(sites[0], layer=first[-1] - 1), block, norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return [*(block for blocks in self.stacks for block in blocks), *self.shorten, *self.lengthen]

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        self.check_length(tokens)
        x = self.embedding(tokens)  # (B, T, D)
        if self.positions is not None:
            x = x + self.positions(tokens)
        x = self.drop(x)
        carry = Carry(tokens, x)
        return self.level(0, x, carry), carry

    def level(self, i: int, x: Tensor, carry: Carry) -> Tensor:
        """The stream of level i through its blocks and all that lies within: (B, T, D) -> (B, T, D).

        The outermost lacks its last block, which is `finish`'s.
        """
        x = through(self.stacks[i], x, carry)
        if i == len(self.factors):
            return x
        coarse = self.shorten[i](x, carry)  # (B, S, D)
        coarse = self.level(i + 1, coarse, Carry(carry.tokens[:, :: self.factors[i]], coarse))
        x = self.lengthen[i](x, carry.but(memo={COARSE: coarse}))
        after = self.stacks[-1 - i]
        return through(after if i else after[:-1], x, carry)

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.stacks[-1][-1] if block is None else block
        return self.ended(last(x, carry), carry.tokens)


def check_shape(n_layers: list[int], factors: list[int], context: int) -> None:
    """Refuse what is no hourglass.

    Raises:
        ValueError: with what was expected.
    """
    if not factors or min(factors) < 2:
        raise ValueError(f"model.factors: {factors} (expected one or more, of 2 or more each)")
    if prod(factors) >= context:
        raise ValueError(
            f"model.factors: {factors} leave one position of {context} tokens (expected a product below data.context)"
        )
    if len(n_layers) != 2 * len(factors) + 1:
        raise ValueError(
            f"model.n_layers: {n_layers}, {len(n_layers)} numbers (expected {2 * len(factors) + 1}: before, within and "
            f"after each of the {len(factors)} model.factors)"
        )
    if min(n_layers) < 0 or n_layers[-1] < 1:
        raise ValueError(f"model.n_layers: {n_layers} (expected 0 or more each, and 1 or more as the last)")
