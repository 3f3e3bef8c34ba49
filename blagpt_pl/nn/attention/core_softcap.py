"""Softmax attention whose scores are soft-capped: no score leaves (-c, c).

Source   Gemma Team 2024, "Gemma 2", arXiv:2408.00118, §2 (c = 50 for attention)
Formula  s = q_t · k_s / sqrt(K);  s ← c · tanh(s / c);  y_t = Σ_{s ≤ t} softmax_s(s) v_s: scaled, capped, then masked
How      on CUDA torch's flex_attention, whose kernel caps each score where it is made (Dong et al. 2024, arXiv:2412.05496);
         torch's fused kernels of plain attention have no place for it. `eager` is its naive twin, and what runs elsewhere
Differs  no dropout: flex_attention has none
Cost     T² (K + K') H multiplications and additions a sequence (causal), K' the width of the values, and T² H / 2 tanh;
         no T × T matrix in the fused form
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import Core, Heads, wide
from blagpt_pl.nn.softcap import a_cap, soft_cap

NARROWEST = 16  # head width that flex_attention's kernels begin at


def causal(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Whether query t reads key s."""
    return t >= s


def eager(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """The naive twin: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K'); scores (B, H, T, T) in memory."""
    n, length = q.shape[1:3]
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H / G · T, K): k is never repeated
    with without_autocast(q.device):  # it would round the scores
        scores = (wide(grouped) @ wide(k).mT).unflatten(2, (-1, length)) * q.shape[-1] ** -0.5  # (B, G, H / G, T, T)
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    p = soft_cap(scores, cap).masked_fill(~past, -torch.inf).softmax(-1).to(v.dtype)
    return (p.flatten(2, 3) @ v).reshape(len(q), n, length, -1)  # (B, H, T, K')


def flex(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """The same through flex_attention; fused once it is compiled."""

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return soft_cap(score, cap)

    length = q.shape[2]
    mask = create_block_mask(causal, None, None, length, length, device=q.device)
    k, same = k.to(q.dtype), v.to(q.dtype)  # under autocast an edit's float32 gain may have widened one of them
    return flex_attention(q, k, same, capped, mask, enable_gqa=q.shape[1] != k.shape[1]).to(v.dtype)


def flex_if_compiled(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """`flex` while it is being compiled, its twin where torch was told to stay eager (as generation tells it)."""
    return flex(q, k, v, cap) if torch.compiler.is_compiling() else eager(q, k, v, cap)


@cache
def fused() -> Callable:
    """For a block that is not compiled; made on first use, for torch.compile alone imports for seconds."""
    return torch.compile(flex_if_compiled, dynamic=False)


class SoftCapped(Core):
    """Causal attention with soft-capped scores.

    Args:
        heads: the attention's heads.
        cap: c of the soft cap, in nats.
    """

    def __init__(self, heads: Heads, cap: float = 50.0) -> None:
        super().__init__()
        self.heads = heads
        self.cap = a_cap("SoftCapped.cap", cap)

    def flops_per_token(self, context: int) -> int:
        h = self.heads
        return context * h.n * (h.dim + h.values)  # q·k and p·v, 2 each, over half the context on average

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        has_kernel = q.device.type == "cuda" and q.dtype != torch.float64
        if not has_kernel or min(q.shape[-1], v.shape[-1]) < NARROWEST:
            return eager(q, k, v, self.cap)
        if torch.compiler.is_compiling():  # the block is: one graph
            return flex(q, k, v, self.cap)
        return fused()(q, k, v, self.cap)
