"""Elementwise nonlinearities.

SiLU      x · sigmoid(x)                      Elfwing et al. 2017, arXiv:1702.03118
GELU      x · Phi(x), or its tanh form        Hendrycks & Gimpel 2016, arXiv:1606.08415
ReLU2     max(x, 0)²                          So et al. 2021 (Primer), arXiv:2109.08668
Cost      none beside the memory of its input
"""

from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.base import Activation


class SiLU(Activation):
    """x · sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GELU(Activation):
    """x · Phi(x) with Phi the normal distribution function.

    Args:
        tanh: use the tanh approximation of GPT-2 (differs by up to 1e-3).
    """

    def __init__(self, tanh: bool = False) -> None:
        super().__init__()
        self.approximate = "tanh" if tanh else "none"

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate=self.approximate)


class ReLU2(Activation):
    """max(x, 0)²."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
