"""Hymba's mixer: attention and Mamba side by side, over the same input, each normed and averaged.

Source   Dong et al. 2024, "Hymba: A Hybrid-head Architecture for Small Language Models", arXiv:2411.13676, §2.1 (heads in parallel),
         §2.2 (global and local layers, keys and values shared), §2.3 (meta tokens); sizes as in the authors' code for transformers
Formula  [q | k | v | u | z] = W_in x;  q, k ← RoPE;  a = core(q, k, v);  s = Mamba(u) gated by z (nn/recurrent/mamba1.py)
         y = W_out (rms_1(a) + rms_2(s)) / 2;  heads of q and k are D / H wide, those of v d / H, d = expand D: a is as wide as s
Layers   global ones read all that came before, local ones a window and the meta tokens. Local layers that follow each other make
         pairs: the second has no W_k and W_v, and reads the first one's keys, already rotated, and values
Differs  W_out is one matrix, no biases but the convolution's and the step sizes', as there. The paper's β_1, β_2 are the norms' gains
Cost     D (H K + G K + G d / H + 2 d) + d D weights, without G (K + d / H) D where they are shared, 2 d gains, and Mamba's
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from blagpt_pl.nn.attention.attention import heads_of
from blagpt_pl.nn.attention.core_meta import MetaWindowed
from blagpt_pl.nn.attention.edit_rope import angles, rotate
from blagpt_pl.nn.base import (
    Carry,
    CoreFactory,
    Heads,
    NormFactory,
    OutputLinear,
    SequenceMixer,
    Site,
    StackedLinear,
    built,
)
from blagpt_pl.nn.checks import at_least_one, positive
from blagpt_pl.nn.recurrent.mamba1 import SelectiveSSM, rank_of
from blagpt_pl.nn.recurrent.selective_scan import form

GLOBAL, LOCAL = "g", "l"
KEYS, VALUES = "parallel_heads.k", "parallel_heads.v"  # in the memo: of the last local layer that had its own


@dataclass(frozen=True)
class HybridSite(Site):
    """Where a block of Hymba stands.

    Attributes:
        context: T, the longest sequence, the meta tokens at its beginning included.
        order: a letter for each layer of the model, g for a global and l for a local one.
        meta: M, how many meta tokens.
    """

    order: str
    meta: int

    @property
    def place(self) -> int:
        """How many local layers stand directly before this one."""
        before = self.order[: self.layer]
        return len(before) - len(before.rstrip(LOCAL))

    @property
    def borrows(self) -> bool:
        """Whether this layer reads the keys and values of the one before."""
        return self.order[self.layer] == LOCAL and self.place % 2 == 1

    @property
    def lends(self) -> bool:
        """Whether the next one reads those of this layer."""
        return self.order[self.layer : self.layer + 2] == 2 * LOCAL and not self.borrows


def a_site(site: Site) -> HybridSite:
    """The site, if it is one of Hymba.

    Raises:
        ValueError: another model does not say which layers are global.
    """
    if not isinstance(site, HybridSite):
        raise ValueError(  # noqa: TRY004
            f"layer {site.layer}: HymbaMixer stands in a model that has no model.order, of global and local layers; "
            "fix: model.class_path: Hymba"
        )
    return site


class HymbaMixer(SequenceMixer):
    """Attention heads and Mamba's heads in parallel, each normed, and averaged.

    Args:
        site: where it stands, in `Hymba`.
        n_heads: H, query heads.
        core: how the queries of global layers read.
        norm: of attention's output, of Mamba's, and of its step sizes, B and C.
        window: how many keys a local layer reads, the query's own position included; the meta tokens come on top.
        n_kv_heads: G, key/value heads; H by default.
        theta: base of the rotations' frequencies; null rotates nothing.
        d_state: N, numbers that Mamba keeps of each channel.
        expand: inner width over the stream's.
        conv: k, width of Mamba's convolution.
        dt_rank: R, numbers that set its step sizes; ceil(D / 16) by default.

    Raises:
        ValueError: another model than Hymba, sizes that do not go into each other, or a window without a local layer.
    """

    continues: ClassVar[bool] = True
    sizes: ClassVar[dict[str, str]] = {
        "n_heads": "heads",
        "n_kv_heads": "heads",
        "window": "tokens",
        "d_state": "head",
        "dt_rank": "head",
    }

    def __init__(
        self,
        site: Site,
        n_heads: int,
        core: CoreFactory,
        norm: NormFactory,
        window: int | None = None,
        n_kv_heads: int | None = None,
        theta: float | None = 10000.0,
        d_state: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
    ) -> None:
        super().__init__()
        here, where = a_site(site), f"layer {site.layer}: HymbaMixer."
        for name, number in {"d_state": d_state, "expand": expand, "conv": conv}.items():
            at_least_one(f"{where}{name}", number)
        if (window is None) == (LOCAL in here.order):
            found = f"{window}, and model.order is {here.order!r}"
            raise ValueError(f"{where}window: {found} (expected a number where there are local layers, and only there)")
        plain = heads_of(site, n_heads, n_kv_heads, None)
        if theta is not None and plain.dim % 2:
            raise ValueError(f"{where}n_heads: RoPE pairs numbers, so the width of a head, {plain.dim}, must be even")
        self.heads = Heads(site, plain.n, plain.n_kv, plain.dim, expand * plain.dim)
        self.theta = None if theta is None else positive(f"{where}theta", theta, "10000.0")
        self.borrows, self.lends = here.borrows, here.lends
        is_global = here.order[site.layer] == GLOBAL
        h, inner = self.heads, expand * site.d_model
        own = [] if self.borrows else [h.n_kv * h.dim, h.n_kv * h.values]
        self.rows = [h.n * h.dim, *own, inner, inner]  # q, k, v, u, z
        heads = [h.dim, *([] if self.borrows else [h.dim, 1]), 1, 1]
        self.proj = StackedLinear(site.d_model, self.rows, bias=False, heads=heads)
        self.core = built("attention.core", core, h) if is_global else MetaWindowed(h, window, here.meta)
        self.ssm = SelectiveSSM(inner, d_state, conv, rank_of(site, "HymbaMixer", dt_rank), norm)
        self.attention_norm = built("attention.norm", norm, inner)
        self.ssm_norm = built("attention.norm", norm, inner)
        self.out = OutputLinear(inner, site.d_model, bias=False)

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How Mamba's half is computed there in training."""
        return form(device, tokens)

    def split_heads(self, x: Tensor, n: int) -> Tensor:
        """(B, T, n K) -> (B, n, T, K)."""
        return x.unflatten(-1, (n, -1)).transpose(1, 2)

    def rotated(self, x: Tensor, carry: Carry) -> Tensor:
        """Queries or keys (B, ., T, K) turned by their positions, of which the meta tokens have the first."""
        if self.theta is None:
            return x
        return rotate(x, angles(x.shape[2], x.shape[3], self.theta, x.device, carry.start))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        past = () if carry.states is None else carry.states.take() or ()
        q, *kv, u, z = self.proj(x).split(self.rows, dim=-1)
        q, left = self.rotated(self.split_heads(q, self.heads.n), carry), ()
        if self.borrows:
            k, v = carry.memo[KEYS], carry.memo[VALUES]
        else:
            k, v = (self.split_heads(t, self.heads.n_kv) for t in kv)
            k = self.rotated(k, carry)
            if carry.states is not None:
                k, v, left, past = self.with_past(k, v, past)
            if self.lends:
                carry.memo[KEYS], carry.memo[VALUES] = k, v
        attended = self.core(q, k, v).transpose(1, 2).flatten(2)  # (B, T, d)
        recurred, memory = self.ssm(u, z, past or None)
        if carry.states is not None:
            carry.states.leave(*left, *memory, grows=self.core.reach is None)
        return self.out((self.attention_norm(attended) + self.ssm_norm(recurred)) / 2)

    def with_past(
        self, k: Tensor, v: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """Keys and values of a piece -> those before it as well, those that the next piece needs, and the rest of the memory."""
        if past:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        return k, v, (self.core.kept(k), self.core.kept(v)), past[2:]
