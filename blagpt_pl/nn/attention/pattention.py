"""The sequence mixer of TokenFormer: attention whose four projections are Pattentions.

Source   Wang et al. 2024, arXiv:2410.23168, section 3.2
Formula  q, k, v = Pattention_q(x), Pattention_k(x), Pattention_v(x);  (q, k, v) ← edit(q, k, v) in the order written;
         y = Pattention_o(core(q, k, v))
Differs  the paper has as many key/value heads as query heads; here they can be grouped
Cost     N (4 D + 2 (H + G) K) weights
"""

from typing import ClassVar

from torch import Tensor

from blagpt_pl.nn.attention.attention import HEAD_SIZES, HeadPipeline, heads_of
from blagpt_pl.nn.base import CoreFactory, HeadEditFactory, Site
from blagpt_pl.nn.pattention import OutputPattention, Pattention


class PattentionAttention(HeadPipeline):
    """Multi-head attention between tokens, each projection an attention to learned tokens.

    Args:
        site: where it stands.
        n_heads: H, query heads.
        n_tokens: N, parameter tokens of each of the four projections.
        core: how the queries read.
        edits: edits of the heads, applied in the order written.
        n_kv_heads: G, key/value heads; H by default.
        head_dim: K, width of a head; D / H by default.
        grown_from: how many tokens each had when training began, if some have been added since.
    """

    sizes: ClassVar[dict[str, str]] = {**HEAD_SIZES, "n_tokens": "width", "grown_from": "width"}
    continues: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        n_heads: int,
        n_tokens: int,
        core: CoreFactory,
        edits: list[HeadEditFactory] | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        grown_from: int | None = None,
    ) -> None:
        heads = heads_of(site, n_heads, n_kv_heads, head_dim)
        super().__init__(heads, core, edits)
        width = heads.n * heads.dim
        width_kv = heads.n_kv * heads.dim
        self.q = Pattention(site, site.d_model, width, n_tokens, grown_from=grown_from)
        self.k = Pattention(site, site.d_model, width_kv, n_tokens, grown_from=grown_from)
        self.v = Pattention(site, site.d_model, width_kv, n_tokens, grown_from=grown_from)
        self.out = OutputPattention(site, width, site.d_model, n_tokens, grown_from=grown_from)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (p(x).unflatten(-1, (-1, self.heads.dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return q, k, v  # (B, H, T, K), (B, G, T, K), (B, G, T, K)
