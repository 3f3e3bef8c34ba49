"""Soft-capping: squeeze numbers smoothly into (-c, c), leaving small ones almost as they are.

Source   Gemma Team 2024, "Gemma 2", arXiv:2408.00118, §2; before it Bello et al. 2016, arXiv:1611.09940
Formula  y = c · tanh(x / c):  y ≈ x - x³ / (3 c²) for |x| much smaller than c;  dy/dx = 1 - (y / c)²
Differs  never in place: the backward pass of tanh reads its own output; SoftCap works in float32 whatever the input's dtype
Cost     one tanh a number, no parameters
"""

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import wide
from blagpt_pl.nn.checks import positive


def a_cap(socket: str, cap: float) -> float:
    """A cap that caps: positive and finite."""
    return positive(socket, cap, "30.0; leave it out for no cap")


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """c · tanh(x / c), in the dtype of x."""
    return cap * torch.tanh(x / cap)


class SoftCap(nn.Module):
    """c · tanh(x / c), elementwise.

    Args:
        cap: c, which no number of the output exceeds in size.
        socket: where it is set, for the error.
    """

    def __init__(self, cap: float, socket: str = "cap") -> None:
        super().__init__()
        self.cap = a_cap(socket, cap)

    def forward(self, x: Tensor) -> Tensor:
        return soft_cap(wide(x), self.cap).to(x.dtype)
