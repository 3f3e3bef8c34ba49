"""Normalisations over the last dimension.

RMSNorm    Zhang & Sennrich 2019, arXiv:1910.07467, eq. (4):  y_i = g_i · x_i / sqrt(mean_j x_j² + eps)
LayerNorm  Ba et al. 2016, arXiv:1607.06450:                  y_i = g_i · (x_i - mean) / sqrt(var + eps) + b_i
Differs    statistics in float32 whatever the input's dtype; the result has the input's dtype
Cost       D parameters (LayerNorm: 2 D, or D, or none), no matmul
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Norm, wide
from blagpt_pl.nn.checks import not_negative


class RMSNorm(Norm):
    """Rescale a vector to unit root-mean-square, then apply a learned gain.

    Args:
        dim: width of the last dimension.
        eps: added to the mean square, so that a zero vector stays zero.

    Raises:
        ValueError: a negative eps.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = not_negative("RMSNorm.eps", eps, "1e-6")
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps).to(x.dtype)


class LayerNorm(Norm):
    """Centre a vector, rescale it to unit variance, then apply a learned gain and shift.

    Args:
        dim: width of the last dimension.
        eps: added to the variance.
        bias: whether to learn the shift.
        gain: whether to learn the gain; without gain and bias the norm has no parameters, as in TokenFormer.

    Raises:
        ValueError: a negative eps.
    """

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True, gain: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = not_negative("LayerNorm.eps", eps, "1e-5")
        self.weight = nn.Parameter(torch.ones(dim)) if gain else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        gain, shift = (None if p is None else wide(p) for p in (self.weight, self.bias))
        return F.layer_norm(wide(x), (self.dim,), gain, shift, self.eps).to(x.dtype)
