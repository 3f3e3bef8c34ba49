"""Multi-head attention as a pipeline: project, edit the heads, let the queries read, project back.

Source   Vaswani et al. 2017, arXiv:1706.03762; grouped queries: Ainslie et al. 2023, arXiv:2305.13245;
         bias on q, k, v alone: Qwen2, arXiv:2407.10671
Formula  [q k v] = W_qkv x (+ b);  (q, k, v) ← edit(q, k, v) in the order written;  y = W_o core(q, k, v) (+ b)
Cost     D (H + 2 G) K + H K D weights
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import (
    Carry,
    CoreFactory,
    HeadEditFactory,
    Heads,
    OutputLinear,
    SequenceMixer,
    Site,
    StackedLinear,
    built,
)
from blagpt_pl.nn.states import States

HEAD_SIZES = {"n_heads": "heads", "n_kv_heads": "heads", "head_dim": "head"}  # what `heads_of` is given, for `sizes`


def heads_of(site: Site, n_heads: int, n_kv_heads: int | None, head_dim: int | None) -> Heads:
    """The head counts of an attention, checked.

    Raises:
        ValueError: the width does not split into the heads, or the query heads not into groups.
    """
    if n_heads < 1 or (head_dim is not None and head_dim < 1):
        raise ValueError(f"layer {site.layer}: n_heads={n_heads}, head_dim={head_dim} (expected 1 or more of each)")
    if head_dim is None:
        if site.d_model % n_heads:
            fits = [n for n in range(max(1, n_heads - 8), n_heads + 9) if site.d_model % n == 0]
            raise ValueError(
                f"layer {site.layer}: d_model={site.d_model} does not split into n_heads={n_heads}; "
                f"nearby counts that do: {fits}"
            )
        head_dim = site.d_model // n_heads
    n_kv = n_heads if n_kv_heads is None else n_kv_heads
    if n_kv < 1 or n_heads % n_kv:
        fits = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        raise ValueError(
            f"layer {site.layer}: n_heads={n_heads} does not group into n_kv_heads={n_kv}; choose of {fits}"
        )
    return Heads(site, n_heads, n_kv, head_dim)


class HeadPipeline(SequenceMixer, ABC):
    """project → edits → core → out, whatever the projections are made of: a subclass says `project` and sets `out`.

    Args:
        heads: the head counts.
        core: how the queries read.
        edits: edits of the heads, applied in the order written.
    """

    out: nn.Module

    def __init__(self, heads: Heads, core: CoreFactory, edits: list[HeadEditFactory] | None) -> None:
        super().__init__()
        self.heads = heads
        self.edits = nn.ModuleList(built(f"attention.edits[{i}]", edit, heads) for i, edit in enumerate(edits or []))
        self.core = built("attention.core", core, heads)

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> q (B, H, T, K), k (B, G, T, K), v (B, G, T, K) or of another width."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        q, k, v = self.project(x)
        for edit in self.edits:
            q, k, v = edit(q, k, v, carry)
        if carry.states is not None:
            k, v = self.with_past(k, v, carry.states)
        return self.out(self.core(q, k, v).transpose(1, 2).flatten(2))  # (B, T, H · width of v) -> (B, T, D)

    def with_past(self, k: Tensor, v: Tensor, states: States) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, T, .) of a piece -> those before it that may be read, and its own; left for the next piece."""
        past = states.take()
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        states.leave(self.core.kept(k), self.core.kept(v), grows=self.core.reach is None)
        return k, v


class Attention(HeadPipeline):
    """Multi-head attention; grouped (1 < G < H), multi-query (G = 1) or plain (G = H).

    The projection is one matrix of (H + 2 G) K rows: all queries, then all keys, then all values.

    Args:
        site: where it stands.
        n_heads: H, query heads.
        core: how the queries read.
        edits: edits of the heads, applied in the order written.
        n_kv_heads: G, key/value heads; H by default.
        head_dim: K, width of a head; D / H by default.
        qkv_bias: whether the projections to q, k and v have a bias.
        out_bias: whether the projection back has one.
    """

    sizes: ClassVar[dict[str, str]] = HEAD_SIZES
    continues: ClassVar[bool] = True

    def __init__(
        self,
        site: Site,
        n_heads: int,
        core: CoreFactory,
        edits: list[HeadEditFactory] | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        heads = heads_of(site, n_heads, n_kv_heads, head_dim)
        super().__init__(heads, core, edits)
        rows = [n * heads.dim for n in (heads.n, heads.n_kv, heads.n_kv)]
        self.qkv = StackedLinear(site.d_model, rows, qkv_bias, heads=[heads.dim, heads.dim, 1])
        self.out = OutputLinear(heads.n * heads.dim, site.d_model, out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.heads
        qkv = self.qkv(x).unflatten(-1, (-1, h.dim)).transpose(1, 2)  # (B, H + 2 G, T, K)
        return qkv.split([h.n, h.n_kv, h.n_kv], dim=1)
