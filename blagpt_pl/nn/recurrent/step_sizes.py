"""How the step sizes of Mamba's recurrences start.

Source   Gu & Dao 2023, "Mamba", arXiv:2312.00752, §3.6
Formula  softplus(b) log-uniform in [0.001, 0.1]
"""

import math

import torch
from torch import Tensor

STEPS = 1e-3, 0.1


def step_biases(n: int) -> Tensor:
    """(n,): what softplus makes step sizes of."""
    low, high = map(math.log, STEPS)
    step = torch.empty(n).uniform_(low, high).exp()
    return step + (-torch.expm1(-step)).log()  # softplus, backwards
