"""A sliding window beside the first positions, which every query reads: meta tokens, attention sinks.

Source   Dong et al. 2024, "Hymba", arXiv:2411.13676, §2.3 (meta tokens stay in sight of a window); Xiao et al. 2023, "Efficient
         Streaming Language Models with Attention Sinks", arXiv:2309.17453, §3.2
Formula  y_t = Σ_s softmax_s(q_t · k_s / sqrt(K)) v_s over s ≤ t with t - s < w or s < M
How      on CUDA flex_attention (flex.py). Elsewhere `banded`: queries in chunks of w, each beside the first M keys, those of the chunk
         before and its own; exact, and no T × T matrix either
Differs  the authors' code has t - s ≤ w, one key more: w here is how many a window reads, as in core_window.py. Positions of the first
         M are as they are; Xiao et al. move them along with the window
Cost     2 (K + K') H multiplications and additions a pair; a query has min(t + 1, w) + min(M, max(0, t + 1 - w)). `banded` computes
         up to 2 w + M of them
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.attention.flex import Pair, fused, fused_or, has_kernel
from blagpt_pl.nn.attention.later import read
from blagpt_pl.nn.base import Core, Heads


def near_or_first(sizes: tuple[int, int]) -> Pair:
    """Each query reads the last `window` keys up to its own, and of those before them the first `always`."""
    window, always = sizes

    def pair(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & ((t - s < window) | (s < always))

    return pair


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, always: int) -> Tensor:
    """The twin, by chunks of the window: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K')."""
    length, w, dtype = q.shape[2], min(window, q.shape[2]), v.dtype
    k, v = k.to(q.dtype), v.to(q.dtype)
    ones = torch.ones(w, 2 * w, dtype=torch.bool, device=q.device)
    near = ones.triu(1).tril(w)  # key j of the chunk before and of its own: i < j <= i + w
    early = read(q[:, :, :w], k[:, :, :w], v[:, :, :w], near[:, w:], None)  # nothing is out of a window yet
    if length == w:
        return early.to(dtype)
    k_first, v_first = k[:, :, :always], v[:, :, :always]  # (B, G, M, .)
    q, k, v = (F.pad(x, (0, 0, 0, -length % w)).unflatten(2, (-1, w)).transpose(1, 2) for x in (q, k, v))
    rows, chunks = len(q), q.shape[1] - 1
    at = torch.arange(w, w + chunks * w, device=q.device).unflatten(0, (chunks, w))  # (n, w): t
    far = (
        at[..., None] - torch.arange(k_first.shape[2], device=q.device) >= w
    )  # (n, w, M): else it is among the near ones
    pairs = torch.cat((far, near.expand(chunks, -1, -1)), dim=-1).repeat(rows, 1, 1)[:, None]  # (B n, 1, w, M + 2 w)
    q = q[:, 1:].flatten(0, 1)  # (B n, H, w, K)
    k, v = (
        torch.cat((first[:, None].expand(-1, chunks, -1, -1, -1), x[:, :-1], x[:, 1:]), dim=3).flatten(0, 1)
        for first, x in ((k_first, k), (v_first, v))
    )  # (B n, G, M + 2 w, .)
    later = read(q, k, v, pairs, None).unflatten(0, (rows, chunks)).transpose(1, 2).flatten(2, 3)  # (B, H, n w, K')
    return torch.cat((early, later), dim=2)[:, :, :length].to(dtype)


def flex(q: Tensor, k: Tensor, v: Tensor, window: int, always: int) -> Tensor:
    """The same through flex_attention; fused once it is compiled."""
    return fused(q, k, v, near_or_first, (window, always), None)


class MetaWindowed(Core):
    """Causal attention within a sliding window, and to the first positions of all.

    Args:
        heads: the attention's heads.
        window: w, the last positions that a query reads, its own included.
        always: M, the first positions, which it reads as well.

    Raises:
        ValueError: a window of nothing but the query's own position, no first positions, or both leave nothing out.
    """

    sizes: ClassVar[dict[str, str]] = {"window": "tokens", "always": "tokens"}
    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, window: int, always: int) -> None:
        super().__init__()
        where, context = f"layer {heads.site.layer}: ", heads.site.context
        if window < 2:
            raise ValueError(f"{where}window: {window} (expected 2 or more: itself and one before it)")
        if always < 1:
            raise ValueError(f"{where}always: {always} (expected 1 or more; fix: Windowed, which has a window alone)")
        if window + always >= context:
            raise ValueError(
                f"{where}window: {window} and the first {always} leave nothing out of {context} positions (expected less "
                "together); fix: a shorter window, or layers that are global"
            )
        self.heads = heads
        self.window = window
        self.always = always
        self.reach = window + always

    def kept(self, x: Tensor) -> Tensor:
        """Of all keys or values (B, G, S, .) those that a later query reads: the first, and the last but one of a window."""
        if x.shape[2] < self.always + self.window:
            return x
        return torch.cat((x[:, :, : self.always], x[:, :, x.shape[2] - self.window + 1 :]), dim=2)

    def flops_per_token(self, context: int) -> int:
        w, h = min(self.window, context), self.heads
        m = min(self.always, context - w)
        pairs = w * (w + 1) // 2 + (context - w) * w + m * (m + 1) // 2 + (context - w - m) * m
        return 2 * h.n * (h.dim + h.values) * pairs // context  # q·k and p·v, 2 each

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return "flex" if has_kernel(device, dtype, self.heads.dim, self.heads.values) else "chunks of the window"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries, keys = q.shape[2], k.shape[2]
        if queries < keys:  # a piece of a sequence; of the keys before it none is missing but those that nobody reads
            t = torch.arange(keys - queries, keys, device=q.device)[:, None]
            s = torch.arange(keys, device=q.device)
            pairs = near_or_first((self.window, self.always))(t, t, t, s)
            return read(q, k.to(q.dtype), v.to(q.dtype), pairs, None).to(v.dtype)
        return fused_or(flex, banded, q, k, v, self.window, self.always)
