"""Cross-attention: the positions of one stream read another stream.

Source   Vaswani et al. 2017, arXiv:1706.03762, §3.2.3 ("encoder-decoder attention")
Formula  q = W_q x,  [k v] = W_kv c (+ b);  y_t = W_o Σ_s softmax_s(q_t · k_s / sqrt(K)) v_s over the s that t may read: all of
         them; or with a stride r, where c_s stands for the positions up to r s, the past: s ≤ t // r
How      with a stride, the r positions that read the same s are r heads of one position: one causal call over T / r positions,
         with keys and values shared by r times as many query heads. No mask is made, no key is repeated
Positions with `theta`, RoPE on one grid: queries turned by t, keys by r s
Cost     D (H K) + D_c (2 G K) + H K D weights; T S (K + K') H multiplications and additions, half of that with a stride
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.attention.attention import HEAD_SIZES, heads_of
from blagpt_pl.nn.attention.backends import attend
from blagpt_pl.nn.attention.edit_rope import angles, rotate
from blagpt_pl.nn.base import NormFactory, OutputLinear, Site, StackedLinear, built
from blagpt_pl.nn.checks import positive


class Cross(nn.Module):
    """A part that reads another stream: x (B, T, D) and context (B, S, D) -> (B, T, D)."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must say how it computes: (B, T, D), (B, S, D) -> (B, T, D)")


CrossFactory = Callable[[Site, int | None], Cross]


class CrossAttention(Cross):
    """Multi-head attention to another stream.

    Args:
        site: where it stands.
        stride: r; position t reads s ≤ t // r. All of them where it is None.
        n_heads: H, query heads.
        n_kv_heads: G, key/value heads; H by default.
        head_dim: K, width of a head; D / H by default.
        qk_norm: normalisation of every query and key head; none by default.
        theta: base of RoPE's frequencies; no RoPE by default.
        qkv_bias: whether the projections to q, k and v have a bias.
        out_bias: whether the projection back has one.

    Raises:
        ValueError: heads that the width does not split into, or RoPE where the other stream has no positions.
    """

    sizes: ClassVar[dict[str, str]] = HEAD_SIZES

    def __init__(
        self,
        site: Site,
        stride: int | None,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: NormFactory | None = None,
        theta: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__()
        self.heads = h = heads_of(site, n_heads, n_kv_heads, head_dim)
        if theta is not None and (stride is None or h.dim % 2):
            why = (
                "what it reads has no positions here" if stride is None else f"RoPE pairs numbers, head_dim is {h.dim}"
            )
            raise ValueError(f"CrossAttention.theta: {theta}, but {why} (expected null)")
        self.stride = stride
        self.theta = None if theta is None else positive("CrossAttention.theta", theta, "10000.0")
        self.q = StackedLinear(site.d_model, [h.n * h.dim], qkv_bias, heads=[h.dim])
        self.kv = StackedLinear(site.d_model, [h.n_kv * h.dim] * 2, qkv_bias, heads=[h.dim, 1])
        self.q_norm, self.k_norm = (
            nn.Identity() if qk_norm is None else built("CrossAttention.qk_norm", qk_norm, h.dim) for _ in range(2)
        )
        self.out = OutputLinear(h.n * h.dim, site.d_model, out_bias)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h, r = self.heads, self.stride
        q = self.q_norm(self.q(x).unflatten(-1, (-1, h.dim)).transpose(1, 2))  # (B, H, T, K)
        k, v = self.kv(context).unflatten(-1, (-1, h.dim)).transpose(1, 2).chunk(2, dim=1)  # (B, G, S, K) each
        k = self.k_norm(k)
        if r is None:
            y = attend(q, k, v, 0.0, grouped=h.n != h.n_kv, is_causal=False)
        else:
            assert q.shape[2] == r * k.shape[2], f"{q.shape[2]} positions, {k.shape[2]} of a stride of {r}"
            if self.theta is not None:
                angle = angles(q.shape[2], h.dim, self.theta, q.device)  # (T, K/2)
                q, k = rotate(q, angle), rotate(k, angle[::r])
            y = read_by_groups(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H · K) -> (B, T, D)


def read_by_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query t reads s ≤ t // r, r = T / S: q (B, H, T, K), k (B, G, S, K), v (B, G, S, K') -> (B, H, T, K')."""
    n, s = q.shape[1], k.shape[2]
    q = q.unflatten(2, (s, -1)).transpose(2, 3).flatten(1, 2)  # (B, H · r, S, K)
    y = attend(q, k, v, 0.0, grouped=q.shape[1] != k.shape[1], is_causal=True)
    return y.unflatten(1, (n, -1)).transpose(2, 3).flatten(2, 3)  # (B, H, S · r, K')


def read_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The naive twin: every score, and the mask of the definition."""
    t, s = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    allowed = s[None] <= t[:, None] // (len(t) // len(s))  # (T, S)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
