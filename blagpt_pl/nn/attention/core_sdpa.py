"""Softmax attention through torch's fused kernels.

Source   Vaswani et al. 2017, arXiv:1706.03762; kernels: Dao 2023, arXiv:2307.08691, and torch's own
Formula  y_t = Σ_{s ≤ t} softmax_s(q_t · k_s / sqrt(K)) v_s; query head h reads key/value head h // (H / G)
Differs  the keys and values of a group are never repeated in memory by a fused kernel (backends.py: which one, and where none)
Cost     T² (K + K') H multiplications and additions a sequence (causal), K' the width of the values; no T × T matrix where
         a fused kernel runs. K' = K: all of them can. K' ≠ K: on CUDA cuDNN's or the memory-efficient kernel, for
         flash attention refuses it (torch's sdp_utils.cpp); on CPU none, so that the T × T matrix is made
"""

from typing import ClassVar

import torch
from torch import Tensor

from blagpt_pl.nn.attention.backends import backend_used, causal
from blagpt_pl.nn.attention.later import last
from blagpt_pl.nn.base import Core, Heads
from blagpt_pl.nn.checks import probability


class SDPA(Core):
    """Causal scaled-dot-product attention.

    Args:
        heads: the attention's heads.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: a dropout that is no probability, or that drops everything.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = probability(f"layer {heads.site.layer}: SDPA.dropout", dropout)

    def flops_per_token(self, context: int) -> int:
        h = self.heads
        return context * h.n * (h.dim + h.values)  # q·k and p·v, 2 each, over half the context on average

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """Which of torch's kernels it comes to in training, for one sequence of so many tokens."""
        h = self.heads
        made = ((h.n, h.dim), (h.n_kv, h.dim), (h.n_kv, h.values))
        q, k, v = (torch.empty(1, n, tokens, w, device=device, dtype=dtype, requires_grad=True) for n, w in made)
        return backend_used(q, k, v, self.dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] < k.shape[2]:
            return last(q, k, v)
        return causal(q, k, v, self.dropout if self.training else 0.0, self.heads.n != self.heads.n_kv)
