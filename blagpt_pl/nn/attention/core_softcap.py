"""Softmax attention whose scores are soft-capped: no score leaves (-c, c).

Source   Gemma Team 2024, "Gemma 2", arXiv:2408.00118, §2 (c = 50 for attention)
Formula  s = q_t · k_s / sqrt(K);  s ← c · tanh(s / c);  y_t = Σ_{s ≤ t} softmax_s(s) v_s: scaled, capped, then masked
How      on CUDA torch's flex_attention, whose kernel caps each score where it is made (flex.py); torch's fused kernels of plain
         attention have no place for it. `eager` is its naive twin, and what runs elsewhere
Differs  no dropout: flex_attention has none
Cost     T² (K + K') H multiplications and additions a sequence (causal), K' the width of the values, and T² H / 2 tanh;
         no T × T matrix in the fused form
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from blagpt_pl.nn.attention.flex import band, fused, fused_or, has_kernel, scored
from blagpt_pl.nn.attention.later import last
from blagpt_pl.nn.base import Core, Heads
from blagpt_pl.nn.softcap import a_cap, soft_cap


def eager(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """The naive twin: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K'); scores (B, H, T, T) in memory."""
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    return scored(q, k, v, past, partial(soft_cap, cap=cap))


def flex(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """The same through flex_attention; fused once it is compiled."""
    return fused(q, k, v, band, None, cap)


class SoftCapped(Core):
    """Causal attention with soft-capped scores.

    Args:
        heads: the attention's heads.
        cap: c of the soft cap, in nats.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, cap: float = 50.0) -> None:
        super().__init__()
        self.heads = heads
        self.cap = a_cap("SoftCapped.cap", cap)

    def flops_per_token(self, context: int) -> int:
        h = self.heads
        return context * h.n * (h.dim + h.values)  # q·k and p·v, 2 each, over half the context on average

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return "flex" if has_kernel(device, dtype, self.heads.dim, self.heads.values) else "scores in memory"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] < k.shape[2]:
            return last(q, k, v, cap=self.cap)
        return fused_or(flex, eager, q, k, v, self.cap)
