"""KV-shifting: every key and value head mixes its token's key and value with those of the token before.

Source   Xu et al. 2024, "KV Shifting Attention Enhances Language Modeling", arXiv:2411.19574
Formula  k_t ← a1 k_t + a2 k_{t-1},  v_t ← b1 v_t + b2 v_{t-1},  k_{-1} = v_{-1} = 0; four scalars for each key/value head
         a1, b1 ~ U(0, 1), a2 = 1 - a1, b2 = 1 - b1 at the start, all four free afterwards
Differs  nothing; the previous token is taken across document boundaries, as the attention itself looks across them
Cost     4 G parameters and 6 G K multiply-adds and additions a token, a layer; no matrix product
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, HeadEdit, Heads, wide


def mixed(x: Tensor, now: Tensor, past: Tensor) -> Tensor:
    """now x_t + past x_{t-1} for x (B, G, T, K) and one number for each head in now and past (G,)."""
    before = F.pad(x[:, :, :-1], (0, 0, 1, 0))  # (B, G, T, K): x_{t-1}, and 0 at t = 0
    return (wide(now)[:, None, None] * x + wide(past)[:, None, None] * before).to(x.dtype)  # the sum in float32


class KVShift(HeadEdit):
    """Mix every key and value with its predecessor.

    Stands first, before QK-norm and RoPE: the key that comes from t - 1 then gets the position t of the mixture. After
    RoPE it would keep its own position t - 1, which is another technique; after QK-norm the mixture would not be
    normalised any more. An edit does not see its neighbours, so neither is refused.

    Args:
        heads: the attention's heads.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.k_now = nn.Parameter(torch.rand(heads.n_kv))  # (G,)
        self.v_now = nn.Parameter(torch.rand(heads.n_kv))
        self.k_past = nn.Parameter(1 - self.k_now.detach())
        self.v_past = nn.Parameter(1 - self.v_now.detach())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        return q, mixed(k, self.k_now, self.k_past), mixed(v, self.v_now, self.v_past)
