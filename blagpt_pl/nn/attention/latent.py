"""Multi-head latent attention (MLA): keys and values are read out of one short latent a token, and rotate beside it.

Source   DeepSeek-AI 2024, "DeepSeek-V2", arXiv:2405.04434, §2.1, eq. (9)-(19); the norms of the latents: §3.1.2 there.
         Meng et al. 2025, "TransMLA", arXiv:2502.07864, turns trained grouped-query models into this form; not done here
Formula  q = W_q x, or W_qb norm(W_qa x);  [q_n q_r] = q, head by head
         [c k_r] = W_kva x;  [k_n v] = W_kvb norm(c), head by head
         q ← [q_n RoPE(q_r)],  k ← [k_n RoPE(k_r)], k_r one for all heads;  y = W_o core(q, k, v), K = nope + rope wide
Differs  pairs of RoPE are halves (i with i + rope/2), neighbours in DeepSeek's checkpoints: a permutation of W_q and W_kva.
         No bias, as published. c and k_r are all that a cache would hold; there is no cache here: training expands them
Cost     D H K + D (kv + rope) + kv H (nope + v) + H v D weights (kv: kv_rank, v: v_dim); D q_rank + q_rank H K in place
         of D H K with compressed queries. q, k and v of all heads are made, k_r copied into each: kernels take k whole.
         v_dim = nope + rope lets every fused kernel run, other widths not (see core_sdpa.py)
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.attention.attention import HeadPipeline
from blagpt_pl.nn.attention.edit_rope import angles, rotate
from blagpt_pl.nn.base import CoreFactory, Heads, NormFactory, OutputLinear, Site, StackedLinear, built
from blagpt_pl.nn.checks import positive


class LatentAttention(HeadPipeline):
    """Multi-head latent attention.

    Args:
        site: where it stands.
        n_heads: H, heads of queries, keys and values alike.
        core: how the queries read; told G = H and the widths K = nope_dim + rope_dim and v_dim.
        norm: normalisation of the latents.
        kv_rank: width of the latent of keys and values.
        nope_dim: numbers of a query or key head that do not rotate; of keys they come from the latent.
        rope_dim: numbers that do; of keys they come from the stream, and all heads share them.
        v_dim: width of a head of values.
        q_rank: width of the latent of queries; None projects them in one step.
        theta: base of RoPE's frequencies.

    Raises:
        ValueError: a width below 1, an odd rope_dim, or a theta that is not positive and finite.
    """

    sizes: ClassVar[dict[str, str]] = {
        "n_heads": "heads",
        **dict.fromkeys(("kv_rank", "q_rank"), "width"),
        **dict.fromkeys(("nope_dim", "rope_dim", "v_dim"), "head"),
    }

    def __init__(
        self,
        site: Site,
        n_heads: int,
        core: CoreFactory,
        norm: NormFactory,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_dim: int,
        q_rank: int | None = None,
        theta: float = 10000.0,
    ) -> None:
        sizes = {"n_heads": n_heads, "kv_rank": kv_rank, "nope_dim": nope_dim, "rope_dim": rope_dim, "v_dim": v_dim}
        for name, size in {**sizes, "q_rank": 1 if q_rank is None else q_rank}.items():
            if size < 1:
                raise ValueError(f"layer {site.layer}: {name}={size} (expected 1 or more)")
        if rope_dim % 2:
            raise ValueError(
                f"layer {site.layer}: RoPE pairs numbers, so rope_dim={rope_dim} must be even, such as {rope_dim + 1}"
            )
        super().__init__(Heads(site, n_heads, n_heads, nope_dim + rope_dim, v_dim), core, edits=None)
        self.latent = [kv_rank, rope_dim]
        self.rotary = [nope_dim, rope_dim]
        self.theta = positive("LatentAttention.theta", theta, "10000.0")
        d, width = site.d_model, n_heads * self.heads.dim  # D, H K
        if q_rank is None:
            self.q = StackedLinear(d, [width], bias=False, heads=[self.heads.dim])
        else:
            q_norm = built("attention.norm", norm, q_rank)
            q_up = StackedLinear(q_rank, [width], bias=False, heads=[self.heads.dim])
            self.q = nn.Sequential(nn.Linear(d, q_rank, bias=False), q_norm, q_up)
        self.kv_down = StackedLinear(d, self.latent, bias=False)
        self.kv_norm = built("attention.norm", norm, kv_rank)
        self.kv_up = nn.Linear(kv_rank, n_heads * (nope_dim + v_dim), bias=False)
        self.out = OutputLinear(n_heads * v_dim, d, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q and k (B, H, T, nope + rope), v (B, H, T, v_dim)."""
        h = self.heads
        q = self.q(x).unflatten(-1, (h.n, h.dim)).transpose(1, 2)  # (B, H, T, nope + rope)
        c, k_rope = self.kv_down(x).split(self.latent, dim=-1)  # (B, T, kv_rank), (B, T, rope)
        kv = self.kv_up(self.kv_norm(c)).unflatten(-1, (h.n, -1)).transpose(1, 2)  # (B, H, T, nope + v_dim)
        q_nope, q_rope = q.split(self.rotary, dim=-1)
        k_nope, v = kv.split([self.rotary[0], h.values], dim=-1)
        angle = angles(x.shape[1], self.rotary[1], self.theta, x.device)
        k_rope = rotate(k_rope, angle)[:, None].expand(-1, h.n, -1, -1)  # (B, H, T, rope), one in memory
        return torch.cat((q_nope, rotate(q_rope, angle)), dim=-1), torch.cat((k_nope, k_rope), dim=-1), v
