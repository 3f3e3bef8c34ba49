"""Sliding-window attention: a query reads the last w positions, itself included, and nothing before them.

Source   Beltagy et al. 2020, "Longformer", arXiv:2004.05150, §3.1; causal, as here: Jiang et al. 2023, "Mistral 7B",
         arXiv:2310.06825, §2
Formula  y_t = Σ_{t - w < s ≤ t} softmax_s(q_t · k_s / sqrt(K)) v_s; with a cap c the scores are c · tanh(s / c) (core_softcap.py)
How      on CUDA torch's flex_attention, which skips the blocks outside of the band (flex.py). Elsewhere `banded`: queries in
         chunks of w, each beside the keys of its own chunk and of the one before; exact, and no T × T matrix either
Differs  Longformer's window lies to both sides, and grows from layer to layer. No dropout: flex_attention has none
Cost     2 (K + K') H (w T - w (w - 1) / 2) multiplications and additions a sequence, K' the width of the values: linear in T.
         `banded` computes up to twice as many pairs and copies each key and value twice, not once a query head
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.attention.flex import band, fused, fused_or, has_kernel
from blagpt_pl.nn.attention.later import last, read
from blagpt_pl.nn.base import Core, Heads
from blagpt_pl.nn.softcap import a_cap


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, cap: float | None) -> Tensor:
    """The twin, by chunks of the window: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K')."""
    length, w, dtype = q.shape[2], min(window, q.shape[2]), v.dtype
    k, v = k.to(q.dtype), v.to(q.dtype)
    pairs = (
        torch.ones(w, 2 * w, dtype=torch.bool, device=q.device).triu(1).tril(w)
    )  # key j of both chunks: i < j <= i + w
    first = read(q[:, :, :w], k[:, :, :w], v[:, :, :w], pairs[:, w:], cap)  # nothing stands before it
    if length == w:
        return first.to(dtype)
    q, k, v = (
        F.pad(x, (0, 0, 0, -length % w)).unflatten(2, (-1, w)).transpose(1, 2) for x in (q, k, v)
    )  # (B, n, ., w, .)
    q = q[:, 1:].flatten(0, 1)  # (B (n - 1), H, w, K)
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=3).flatten(0, 1) for x in (k, v))  # (B (n - 1), G, 2 w, .)
    later = (
        read(q, k, v, pairs, cap).unflatten(0, (len(first), -1)).transpose(1, 2).flatten(2, 3)
    )  # (B, H, (n - 1) w, K')
    return torch.cat((first, later), dim=2)[:, :, :length].to(dtype)


def flex(q: Tensor, k: Tensor, v: Tensor, window: int, cap: float | None) -> Tensor:
    """The same through flex_attention; fused once it is compiled."""
    return fused(q, k, v, band, window, cap)


class Windowed(Core):
    """Causal attention within a sliding window.

    Args:
        heads: the attention's heads.
        window: w, positions that a query reads, its own included.
        cap: c of a soft cap of the scores, in nats; None leaves them as they are.

    Raises:
        ValueError: a window that leaves nothing out, or nothing but the query's own position; a cap that is not positive.
    """

    sizes: ClassVar[dict[str, str]] = {"window": "tokens"}
    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, window: int, cap: float | None = None) -> None:
        super().__init__()
        where, context = f"layer {heads.site.layer}: Windowed.window: {window}", heads.site.context
        if window < 2:
            raise ValueError(f"{where} (expected 2 or more: itself and one before it)")
        if window >= context:
            other = "SDPA" if cap is None else f"SoftCapped with a cap of {cap}"
            raise ValueError(
                f"{where} leaves nothing out of {context} tokens (expected less); fix: a shorter window, or {other} as the core"
            )
        self.heads = heads
        self.window = self.reach = window
        self.cap = None if cap is None else a_cap("Windowed.cap", cap)
        self.exempt = {"long memory": f"a layer reads the last {window} tokens"}

    def flops_per_token(self, context: int) -> int:
        w, h = min(self.window, context), self.heads
        pairs = w * (w + 1) // 2 + (context - w) * w
        return 2 * h.n * (h.dim + h.values) * pairs // context  # q·k and p·v, 2 each

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return "flex" if has_kernel(device, dtype, self.heads.dim, self.heads.values) else "chunks of the window"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] < k.shape[2]:
            return last(q, k, v, self.window, self.cap)
        return fused_or(flex, banded, q, k, v, self.window, self.cap)
