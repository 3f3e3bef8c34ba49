"""Attention of a block that is used at several depths: it reads the stream beside the embeddings, twice as wide.

Source   Glorioso et al. 2024, "Zamba", arXiv:2405.16712, §3 (the concatenation and the scale), and "Zamba2", arXiv:2411.15242, §2.1
         (low-rank maps of each use, RoPE); the scale as in transformers' `Zamba2Attention`
Formula  u = norm([x, x0]);  [q k v] = W_qkv u (+ B_l A_l u each);  y = W_o core(√2 · q, k, v) after the edits: the heads are
         K = 2 D / H wide, the scores q · k / √(K / 2), as if they were half as wide
Differs  the norm of [x, x0] is in here
Cost     12 D² + 2 D² weights, 2 D of the norm; twice the attention's FLOPs at the same number of heads
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.adapters import Adapted, low_rank
from blagpt_pl.nn.attention.attention import HeadPipeline
from blagpt_pl.nn.base import (
    Carry,
    CoreFactory,
    HeadEdit,
    HeadEditFactory,
    Heads,
    NormFactory,
    Site,
    StackedLinear,
    built,
)
from blagpt_pl.nn.checks import positive


class ScaledQueries(HeadEdit):
    """Multiply the queries by a number, and so all scores.

    Args:
        heads: the attention's heads.
        factor: the number.

    Raises:
        ValueError: it is not positive.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, factor: float) -> None:
        super().__init__()
        self.factor = positive(f"layer {heads.site.layer}: ScaledQueries.factor", factor, "1.5")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        return q * self.factor, k, v


class SharedAttention(HeadPipeline):
    """Multi-head attention over the stream and the embeddings side by side; Zamba's shared attention.

    Args:
        site: where it stands first.
        n_heads: H; they are 2 D / H wide.
        norm: normalisation of the stream and the embeddings, side by side.
        core: how the queries read.
        edits: edits of the heads, applied in the order written.
        adapted: whether each use adds low-rank maps to those of q, k and v; they are in the carry's memo.

    Raises:
        ValueError: heads that do not go into twice the stream's width.
    """

    sizes: ClassVar[dict[str, str]] = {"n_heads": "heads"}
    continues: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        n_heads: int,
        norm: NormFactory,
        core: CoreFactory,
        edits: list[HeadEditFactory] | None = None,
        adapted: bool = False,
    ) -> None:
        width = 2 * site.d_model
        if n_heads < 1 or width % n_heads:
            fits = [n for n in range(max(1, n_heads - 8), n_heads + 9) if width % n == 0]
            raise ValueError(
                f"layer {site.layer}: SharedAttention.n_heads: {n_heads} do not go into 2 · d_model = {width}; "
                f"nearby counts that do: {fits}"
            )
        heads = Heads(site, n_heads, n_heads, width // n_heads)
        super().__init__(heads, core, edits)
        self.edits.append(ScaledQueries(heads, math.sqrt(2)))
        self.norm = built("attention.norm", norm, width)
        self.qkv = StackedLinear(width, [width] * 3, bias=False, heads=[heads.dim, heads.dim, 1])
        self.out = nn.Linear(width, site.d_model, bias=False)  # into a norm, not into the stream
        self.adapted = adapted

    def maps(self) -> dict[str, Adapted]:
        """What each use adds to."""
        width, heads = 2 * self.heads.site.d_model, {"q": self.heads.dim, "k": self.heads.dim, "v": 1}
        return {name: Adapted(width, (width,), (h,)) for name, h in heads.items()} if self.adapted else {}

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3 · 2 D), queries, keys and values side by side -> (B, H, T, K) each."""
        return x.unflatten(-1, (-1, self.heads.dim)).transpose(1, 2).chunk(3, dim=1)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        u = self.norm(torch.cat((x, carry.x0), dim=-1))  # (B, T, 2 D)
        qkv = self.qkv(u)  # (B, T, 3 · 2 D)
        if self.adapted:
            qkv = qkv + torch.cat([low_rank(u, name, carry.memo) for name in self.maps()], dim=-1)
        return super().forward(qkv, carry)
