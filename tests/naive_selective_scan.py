"""The selective scan by its definition: one position after the other, in whatever dtype it is given."""

import torch
from torch import Tensor


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, dt (B, T, I), a (I, N), b, c (B, T, N), state (B, I, N) -> y (B, T, I) and the last state."""
    h = torch.zeros(len(x), *a.shape, dtype=x.dtype) if state is None else state
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * a) * h + (dt[:, t] * x[:, t])[..., None] * b[:, t, None, :]
        y.append((h * c[:, t, None, :]).sum(-1))
    return torch.stack(y, 1), h
