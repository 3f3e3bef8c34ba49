"""The selective scan with chunks side by side: the form for a GPU, few steps on many numbers.

Formula  as in selective_scan.py
How      each chunk of L positions from a state of 0, position by position, all chunks at once; then the states at the chunks' ends, chunk by
         chunk, exp(a Σ dt) being a chunk's decay; then what each chunk's first state adds to its outputs. The gradients likewise
Cost     2 L + T / L steps; 2 exponentials a number of the state and position forward, 3 more backward, which also holds B T I N numbers
         while it runs
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def step(h: Tensor, ux: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """One position of all chunks: h (B, C, I, N), ux = dt x and dt (B, C, I), a (I, N), b (B, C, N) -> the next h."""
    return (dt[..., None] * a).exp() * h + ux[..., None] * b[..., None, :]


def chunked(x: Tensor, size: int) -> Tensor:
    """(B, T, .) -> (L, B, C, .), zeros behind the end: a step of length 0 changes nothing."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).permute(2, 0, 1, 3).contiguous()


def joined(steps: list[Tensor], length: int) -> Tensor:
    """L times (B, C, .) -> (B, T, .)."""
    return torch.stack(steps, 2).flatten(1, 2)[:, :length].contiguous()


def forwards(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, I), the last state (B, I, N), and the states before the chunks (B, C, I, N); arguments as for `selective_scan`."""
    length = x.shape[1]
    x, dt, b, c = (chunked(t, size) for t in (x, dt, b, c))
    ux, since = dt * x, dt.cumsum(0)  # (L, B, C, I)
    h = torch.zeros_like(state)[:, None].expand(-1, x.shape[2], -1, -1)  # (B, C, I, N)
    own, y, starts = [], [], []
    for t in range(size):
        h = step(h, ux[t], dt[t], a, b[t])
        own.append((h * c[t, :, :, None]).sum(-1))
    decay = (since[-1, ..., None] * a).exp()
    for i in range(x.shape[2]):
        starts.append(state)
        state = decay[:, i] * state + h[:, i]
    first = torch.stack(starts, 1)
    for t in range(size):
        y.append(own[t] + ((since[t, ..., None] * a).exp() * first * c[t, :, :, None]).sum(-1))
    return joined(y, length), state.contiguous(), first


def backwards(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, by_y: Tensor, by_state: Tensor, size: int
) -> list[Tensor]:
    """The gradients by x, dt, a, b, c and the state; those of y and of the last state are given."""
    length = x.shape[1]
    x, dt, b, c, by_y = (chunked(t, size) for t in (x, dt, b, c, by_y))
    ux = dt * x
    back = torch.zeros_like(first)  # by the state before a position, of what the chunk itself does with it
    for t in reversed(range(size)):
        back = (dt[t, ..., None] * a).exp() * (by_y[t, ..., None] * c[t, :, :, None] + back)
    decay, later = (dt.sum(0)[..., None] * a).exp(), []
    for i in reversed(range(first.shape[1])):
        later.append(by_state)  # by the chunk's last state
        by_state = decay[:, i] * by_state + back[:, i]
    back, h = torch.stack(later[::-1], 1), [first]
    for t in range(size):
        h.append(step(h[t], ux[t], dt[t], a, b[t]))
    by_a, by_x, by_dt, by_b, by_c = torch.zeros_like(a), [], [], [], []
    for t in reversed(range(size)):
        by_c.append((by_y[t, ..., None] * h[t + 1]).sum(-2))
        by_h = by_y[t, ..., None] * c[t, :, :, None] + back  # (B, C, I, N)
        back = (dt[t, ..., None] * a).exp() * by_h
        by_exponent = back * h[t]
        taken = (by_h * b[t, :, :, None]).sum(-1)  # (B, C, I): by dt x
        by_x.append(dt[t] * taken)
        by_dt.append(x[t] * taken + (by_exponent * a).sum(-1))
        by_b.append((by_h * ux[t, ..., None]).sum(-2))
        by_a = by_a + (by_exponent * dt[t, ..., None]).sum((0, 1))
    by_x, by_dt, by_b, by_c = (joined(g[::-1], length) for g in (by_x, by_dt, by_b, by_c))
    return [by_x, by_dt, by_a.contiguous(), by_b, by_c, by_state.contiguous()]
