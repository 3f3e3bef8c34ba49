"""Upsampling: from one vector a group back to one vector a position, k of them for each, to be added to a stream that has them.

RepeatUpsample     u_{ik + j} = c_i
LinearUpsample     [u_{ik} ; ... ; u_{ik + k - 1}] = W c_i (+ b)
AttentionUpsample  u = U(c), one of the two above;  u_t ← u_t + Attention(Q = norm(x_t + u_t), K = V = norm(c_s) of all s ≤ t // k);
                   with an MLP also u ← u + mlp(norm(x + u))
Source   Nawrot et al. 2021, "Hierarchical Transformers Are More Efficient Language Models", arXiv:2110.13711, §2.2; the norms are
         those of the authors' code
Differs  the causal mask is the definition above, and none is made (`CrossAttention` with a stride of k)
Start    what maps into the stream are outputs, for an `Init`: where these start at 0, all that the coarse stream is made of begins to
         learn one step later, in a stream within it two steps
Cost     nothing; k D² weights; 4 D² weights and two norms more, and T / 2 k scores a position and head
"""

from collections.abc import Callable

from torch import Tensor, nn

from blagpt_pl.nn.attention.cross import CrossFactory
from blagpt_pl.nn.base import (
    Carry,
    ChannelMixerFactory,
    NormFactory,
    OutputLinear,
    Site,
    StackedLinear,
    built,
)
from blagpt_pl.nn.pooling import normed_mlp


class Upsample(nn.Module):
    """x (B, S k, D), coarse (B, S, D) -> (B, S k, D), to be added to x; tokens (B, S k) stand beside x.

    Position t may read the coarse positions up to t // k.
    """

    def forward(self, x: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
        raise NotImplementedError(
            f"{type(self).__name__} must say how it upsamples: (B, S k, D), (B, S, D), (B, S k) -> (B, S k, D)"
        )


UpsampleFactory = Callable[[Site, int], Upsample]


class RepeatUpsample(Upsample):
    """The group's vector for each of its positions.

    Args:
        site: where it stands, in the stream that it writes into.
        factor: k.
    """

    def __init__(self, site: Site, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
        return coarse.unsqueeze(2).expand(-1, -1, self.factor, -1).flatten(1, 2)  # (B, S, k, D) -> (B, S k, D)


class StackedOutputLinear(StackedLinear, OutputLinear):
    """Linear maps of one input, all of which write into the stream."""


class LinearUpsample(Upsample):
    """A linear map of the group's vector for each place in the group.

    Args:
        site: where it stands, in the stream that it writes into.
        factor: k.
        bias: whether the maps have one.
    """

    def __init__(self, site: Site, factor: int, bias: bool = False) -> None:
        super().__init__()
        self.factor = factor
        self.map = StackedOutputLinear(site.d_model, [site.d_model] * factor, bias)

    def forward(self, x: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
        return self.map(coarse).unflatten(2, (self.factor, -1)).flatten(1, 2)  # (B, S, k D) -> (B, S k, D)


class AttentionUpsample(Upsample):
    """Another upsampling, after which every position reads the coarse positions up to its own.

    Args:
        site: where it stands, in the stream that it writes into.
        factor: k.
        upsample: the other.
        attention: how a position reads the coarse stream.
        norm: normalisation of queries, of what they read, and of what the MLP reads.
        mlp: a channel mixer after the attention; none by default.
    """

    def __init__(
        self,
        site: Site,
        factor: int,
        upsample: UpsampleFactory,
        attention: CrossFactory,
        norm: NormFactory,
        mlp: ChannelMixerFactory | None = None,
    ) -> None:
        super().__init__()
        self.upsample = built("AttentionUpsample.upsample", upsample, site, factor)
        self.query_norm, self.key_norm = (built("AttentionUpsample.norm", norm, site.d_model) for _ in range(2))
        self.attention = built("AttentionUpsample.attention", attention, site, factor)
        self.mlp_norm, self.mlp = (None, None) if mlp is None else normed_mlp("AttentionUpsample", site, norm, mlp)

    def forward(self, x: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
        u = self.upsample(x, coarse, tokens)  # (B, S k, D)
        u = u + self.attention(self.query_norm(x + u), self.key_norm(coarse))
        return u if self.mlp is None else u + self.mlp(self.mlp_norm(x + u), Carry(tokens, x))
