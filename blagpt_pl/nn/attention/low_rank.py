"""Low-rank keys and values: both are read out of one short latent a token, then go on as in plain attention.

Source   no paper; BlaGPT 2025, which calls it MLA. It has the joint compression of DeepSeek-V2, arXiv:2405.04434,
         eq. (9)-(11), and neither the norm of the latent nor the rotation beside it: see latent.py for those
Formula  q = W_q x (+ b);  [k v] = W_up W_down x (+ b): that is `Attention` whose rows of k and v have rank `rank`;
         then edits, core and W_o as there
Differs  from the original: it runs (there a misspelt field, later a default rank of 0, stopped every run), and has no default
Cost     H K D + rank (D + 2 G K) + H K D weights; smaller than attention's where rank < 2 G K D / (D + 2 G K).
         Keys are normalised and rotated after the latent, so a cache of latents is expanded anew for every new token
"""

from typing import ClassVar

from torch import Tensor, nn

from blagpt_pl.nn.attention.attention import HEAD_SIZES, HeadPipeline, heads_of
from blagpt_pl.nn.base import CoreFactory, HeadEditFactory, OutputLinear, Site, StackedLinear


class LowRankAttention(HeadPipeline):
    """Attention whose keys and values pass through one latent.

    The expansion has 2 G K rows: all keys, then all values.

    Args:
        site: where it stands.
        n_heads: H, query heads.
        core: how the queries read.
        rank: width of the latent.
        edits: edits of the heads, applied in the order written.
        n_kv_heads: G, key/value heads; H by default.
        head_dim: K, width of a head; D / H by default.
        qkv_bias: whether the projection to q and the expansion to k and v have a bias; one inside the latent would only
            add to that of the expansion.
        out_bias: whether the projection back has one.

    Raises:
        ValueError: heads that do not fit, or a rank below 1.
    """

    sizes: ClassVar[dict[str, str]] = {**HEAD_SIZES, "rank": "width"}
    continues: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        n_heads: int,
        core: CoreFactory,
        rank: int,
        edits: list[HeadEditFactory] | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        if rank < 1:
            raise ValueError(f"layer {site.layer}: rank={rank} (expected 1 or more)")
        heads = heads_of(site, n_heads, n_kv_heads, head_dim)
        super().__init__(heads, core, edits)
        self.q = StackedLinear(site.d_model, [heads.n * heads.dim], qkv_bias, heads=[heads.dim])
        self.kv_down = nn.Linear(site.d_model, rank, bias=False)
        self.kv_up = StackedLinear(rank, [heads.n_kv * heads.dim] * 2, qkv_bias, heads=[heads.dim, 1])
        self.out = OutputLinear(heads.n * heads.dim, site.d_model, out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.heads
        q, kv = self.q(x), self.kv_up(self.kv_down(x))  # (B, T, H K), (B, T, 2 G K)
        q, kv = (y.unflatten(-1, (-1, h.dim)).transpose(1, 2) for y in (q, kv))  # (B, H, T, K), (B, 2 G, T, K)
        return q, *kv.split(h.n_kv, dim=1)
