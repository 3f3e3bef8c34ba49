"""Rotary position embedding: turn each pair of a head's numbers by an angle that grows with the position.

Source   Su et al. 2021, arXiv:2104.09864; halves paired as in Llama (i with i + K/2), not neighbours
Formula  angle(t, i) = t · theta^(-2 i / K), 0 ≤ i < K/2;  (a, b) ← (a cos - b sin, a sin + b cos)
Differs  angles and rotation in float32 whatever the heads' dtype; computed where they are used, so that no table depends
         on the context and none is cast with the weights
Cost     no parameters; T · K/2 sines and cosines a layer, fused into the rotation when compiled
"""

from typing import ClassVar

import torch
from torch import Tensor

from blagpt_pl.nn.base import Carry, HeadEdit, Heads, wide
from blagpt_pl.nn.checks import positive


def angles(length: int, dim: int, theta: float, device: torch.device, start: int = 0) -> Tensor:
    """(T, K/2) float32: the angle of each position, from `start` on, and frequency."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)  # (K/2,)
    return torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), frequency)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the halves of x (..., T, K) by angle (T, K/2)."""
    a, b = wide(x).chunk(2, dim=-1)  # (..., T, K/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class RoPE(HeadEdit):
    """Rotate queries and keys by their positions.

    Args:
        heads: the attention's heads.
        theta: base of the frequencies; larger turns the slow ones slower.

    Raises:
        ValueError: an odd width of a head, or a base that is not positive and finite.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, theta: float = 10000.0) -> None:
        super().__init__()
        if heads.dim % 2:
            raise ValueError(f"layer {heads.site.layer}: RoPE pairs numbers, so head_dim={heads.dim} must be even")
        self.theta = positive("RoPE.theta", theta, "10000.0")

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        angle = angles(q.shape[-2], q.shape[-1], self.theta, q.device, carry.start)
        return rotate(q, angle), rotate(k, angle), v
