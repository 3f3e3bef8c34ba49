"""Queries of a piece of a sequence, which read the keys of the pieces before as well: how attention goes on, a token at a time.

Formula  query i of T stands at position S - T + i of the S keys:  y_i = Σ_{s ≤ S - T + i} softmax_s(...) v_s, within a window of w
         keys where there is one
Cost     T × S pairs, of which a mask says which count; one query needs none
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.attention.flex import scored
from blagpt_pl.nn.softcap import soft_cap


def read(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, cap: float | None) -> Tensor:
    """Queries (B, H, T, K) read the keys (B, G, S, K) of their pairs (T, S)."""
    if cap is not None:
        return scored(q, k, v, pairs, partial(soft_cap, cap=cap))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, enable_gqa=q.shape[1] != k.shape[1])


def last(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, cap: float | None = None) -> Tensor:
    """The last queries (B, H, T, K) read all keys (B, G, S, K) up to their own, S >= T, or the last `window` of them."""
    queries, keys = q.shape[2], k.shape[2]
    pairs = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if window is not None:
        pairs = pairs.triu(keys - queries - window + 1)
    return read(q, k.to(q.dtype), v.to(q.dtype), pairs, cap).to(v.dtype)
