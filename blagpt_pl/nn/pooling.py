"""Pooling: one vector for every group of k that stand beside each other.

AveragePool    y_i = mean_j x_{ik + j}
LinearPool     y_i = W [x_{ik} ; ... ; x_{ik + k - 1}] (+ b)
AttentionPool  y = S(x), one of the two above;  y_i ← y_i + Attention(Q = norm(y_i), K = V = norm(x_{ik}) ... norm(x_{ik + k - 1}));
               with an MLP also y ← y + mlp(norm(y))
Source   Nawrot et al. 2021, "Hierarchical Transformers Are More Efficient Language Models", arXiv:2110.13711, §2.2; the norms are
         those of the authors' code
Differs  the attention reads the k vectors of its own group, and nothing before them
How      every group is a sequence of the batch: one query, k keys, no mask
Cost     nothing; k D² weights; 4 D² weights and two norms more, and k scores a group and head
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.attention.cross import CrossFactory
from blagpt_pl.nn.base import Carry, ChannelMixer, ChannelMixerFactory, Norm, NormFactory, Site, built


class Pool(nn.Module):
    """x (B, S k, D) -> (B, S, D), every group of k by itself; tokens (B, S) are the last ones that the groups know."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it pools: (B, S k, D), (B, S) -> (B, S, D)")


PoolFactory = Callable[[Site, int], Pool]


class AveragePool(Pool):
    """The mean of the group.

    Args:
        site: where it stands, in the stream that it makes.
        factor: k.
    """

    def __init__(self, site: Site, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.factor)).mean(2)


class LinearPool(Pool):
    """One linear map of the group's vectors, one after the other in a vector of k D.

    Args:
        site: where it stands, in the stream that it makes.
        factor: k.
        bias: whether the map has one.
    """

    def __init__(self, site: Site, factor: int, bias: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.map = nn.Linear(factor * site.d_model, site.d_model, bias)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.map(x.unflatten(1, (-1, self.factor)).flatten(2))  # (B, S, k D) -> (B, S, D)


class AttentionPool(Pool):
    """Another pooling, whose vectors then read those of their group.

    Args:
        site: where it stands, in the stream that it makes.
        factor: k.
        pool: the other.
        attention: how a vector reads the k of its group.
        norm: normalisation of queries, of what they read, and of what the MLP reads.
        mlp: a channel mixer after the attention; none by default.
    """

    def __init__(
        self,
        site: Site,
        factor: int,
        pool: PoolFactory,
        attention: CrossFactory,
        norm: NormFactory,
        mlp: ChannelMixerFactory | None = None,
    ) -> None:
        super().__init__()
        self.factor = factor
        self.pool = built("AttentionPool.pool", pool, site, factor)
        self.query_norm, self.key_norm = (built("AttentionPool.norm", norm, site.d_model) for _ in range(2))
        self.attention = built("AttentionPool.attention", attention, site, None)
        self.mlp_norm, self.mlp = (None, None) if mlp is None else normed_mlp("AttentionPool", site, norm, mlp)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = self.pool(x, tokens)  # (B, S, D)
        queries = self.query_norm(y).flatten(0, 1)[:, None]  # (B S, 1, D)
        keys = self.key_norm(x).unflatten(1, (-1, self.factor)).flatten(0, 1)  # (B S, k, D)
        y = y + self.attention(queries, keys).view_as(y)
        return y if self.mlp is None else y + self.mlp(self.mlp_norm(y), Carry(tokens, y))


def normed_mlp(owner: str, site: Site, norm: NormFactory, mlp: ChannelMixerFactory) -> tuple[Norm, ChannelMixer]:
    """What follows an attention between streams, and the norm before it.

    Args:
        owner: the part that has these sockets, for the error.
        site: where it stands.
        norm, mlp: the parts.
    """
    return built(f"{owner}.norm", norm, site.d_model), built(f"{owner}.mlp", mlp, site)


def late_groups(x: Tensor, factor: int) -> Tensor:
    """(B, T, D) -> (B, S k, D), S = ceil(T / k): a factor - 1 places later, zeros first, so that group i ends with x_{ik}.

    A position in front of group i's k own may then read the group, and what it reads ends with itself.
    """
    groups = -(-x.shape[1] // factor)
    return F.pad(x, (0, 0, factor - 1, (groups - 1) * factor + 1 - x.shape[1]))
