"""KV-shifting: every key and value head mixes its token's key and value with those of the token before.

Source   Xu et al. 2024, "KV Shifting Attention Enhances Language Modeling", arXiv:2411.19574
Formula  k_t ← a1 k_t + a2 k_{t-1},  v_t ← b1 v_t + b2 v_{t-1},  k_{-1} = v_{-1} = 0; four scalars for each key/value head
         a1, b1 ~ U(0, 1), a2 = 1 - a1, b2 = 1 - b1 at the start, all four free afterwards
Differs  nothing; the previous token is taken across document boundaries, as the attention itself looks across them
Cost     4 G parameters and 6 G K multiply-adds and additions a token, a layer; no matrix product
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, HeadEdit, Heads, wide


def mixed(x: Tensor, last: Tensor, now: Tensor, past: Tensor) -> Tensor:
    """now x_t + past x_{t-1} for x (B, G, T, K), `last` (B, G, 1, K) before it, one number for each head in now and past (G,)."""
    before = torch.cat((last, x[:, :, :-1]), dim=2)  # (B, G, T, K): x_{t-1}
    return (wide(now)[:, None, None] * x + wide(past)[:, None, None] * before).to(x.dtype)  # the sum in float32


class KVShift(HeadEdit):
    """Mix every key and value with its predecessor.

    Stands first, before QK-norm and RoPE: the key that comes from t - 1 then gets the position t of the mixture. After
    RoPE it would keep its own position t - 1, which is another technique; after QK-norm the mixture would not be
    normalised any more. An edit does not see its neighbours, so neither is refused.

    Args:
        heads: the attention's heads.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.k_now = nn.Parameter(torch.rand(heads.n_kv))  # (G,)
        self.v_now = nn.Parameter(torch.rand(heads.n_kv))
        self.k_past = nn.Parameter(1 - self.k_now.detach())
        self.v_past = nn.Parameter(1 - self.v_now.detach())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        before = None if carry.states is None else carry.states.take()
        k_last, v_last = (torch.zeros_like(k[:, :, :1]), torch.zeros_like(v[:, :, :1])) if before is None else before
        if carry.states is not None:
            carry.states.leave(k[:, :, -1:], v[:, :, -1:])
        return q, mixed(k, k_last, self.k_now, self.k_past), mixed(v, v_last, self.v_now, self.v_past)
