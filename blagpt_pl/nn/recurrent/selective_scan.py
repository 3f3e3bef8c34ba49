"""The selective scan of Mamba-1: for each channel a state of N numbers, each with a decay of its own that the input sets.

Source   Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, eq. (2a) and
         Algorithm 2, with A by zero-order hold and B by Euler's rule, as the authors' code has it
Formula  h_t = exp(dt_t a) ⊙ h_{t-1} + dt_t x_t b_t;  y_t = Σ_n h_{t,n} c_{t,n};  h (I, N), a (I, N) < 0, b and c (N,)
How      chunks of L positions side by side: each from a state of 0, position by position; then the states at the chunks' ends, chunk by
         chunk, exp(a Σ dt) being a chunk's decay; then what each chunk's first state adds to its outputs. No decay is ever divided
         by, every exponent is at most 0: nothing overflows, however strong it is. The gradients are written out in the same way.
         Forward and backward are one operation of torch each (`torch.library`): a compiled block has them as two nodes of its graph, not
         as thousands. On CUDA they are themselves compiled, on first use, and shared by all layers
Cost     O(T I N), elementwise: 2 exponentials a number of the state and position forward, 3 more backward; 2 L + T / L steps. Kept for
         the backward pass: the inputs and the T / L states between chunks. It computes the states within chunks again, B T I N numbers
         while the backward pass of one layer runs. `SelectiveScan` says that it has no FLOPs, as all that is elementwise (nn/flop_rules.py)
Kernels  flash-linear-attention has none; the authors' package mamba_ssm, which is no dependency, is not used
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.compiled import APART

CHUNK = 32  # positions; at T = 1024, I = 1536, N = 16 on CPU, 16 and 64 are as fast, 8 takes twice as long


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


@cache
def fused(function: Callable) -> Callable:
    """The function as few kernels, compiled on first use, once for each shape, whatever calls it; eager where torch was told so."""
    return torch.compile(function, fullgraph=True, dynamic=False, **APART)


def run(function: Callable, *given: Tensor | int) -> tuple[Tensor, ...] | list[Tensor]:
    """Step by step, but fused on CUDA."""
    return fused(function)(*given) if given[0].is_cuda else function(*given)


@torch.library.custom_op("blagpt::selective_scan", mutates_args=())
def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`forwards` as one operation, of contiguous tensors."""
    y, last, first = run(forwards, x, dt, a, b, c, state, size)
    return y, last, first


@torch.library.custom_op("blagpt::selective_scan_backward", mutates_args=())
def scan_backward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, by_y: Tensor, by_state: Tensor, size: int
) -> list[Tensor]:
    """`backwards` as one operation."""
    return list(run(backwards, x, dt, a, b, c, first, by_y, by_state, size))


@scan.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    first = state.new_empty(x.shape[0], -(-x.shape[1] // size), *a.shape)
    return x.new_empty(x.shape), state.new_empty(state.shape), first


@scan_backward.register_fake
def _(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, by_y: Tensor, by_state: Tensor, size: int
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, dt, a, b, c, by_state)]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.size = inputs[6]


def _gradients(ctx: torch.autograd.function.FunctionCtx, by_y: Tensor, by_state: Tensor, by_first: Tensor) -> tuple:
    return *scan_backward(*ctx.saved_tensors, by_y.contiguous(), by_state.contiguous(), ctx.size), None


scan.register_autograd(_gradients, setup_context=_keep)


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The scan, in float32 (in float64, if an input is), outside of autocast.

    Args:
        x: (B, T, I), what is taken in.
        dt: (B, T, I), how long each step is, 0 or more.
        a: (I, N), rates of decay, below 0.
        b, c: (B, T, N), how the state is written and read.
        state: (B, I, N), what was there before; 0 by default.
        chunk: L, positions of a chunk.

    Returns:
        y (B, T, I) and the last state (B, I, N), in the dtype that they were made in.
    """
    dtype = torch.float64 if torch.float64 in (x.dtype, dt.dtype, a.dtype) else torch.float32
    state = x.new_zeros(len(x), *a.shape) if state is None else state
    with without_autocast(x.device):
        y, last, _ = scan(*(t.to(dtype).contiguous() for t in (x, dt, a, b, c, state)), min(chunk, x.shape[1]))
    return y, last


class SelectiveScan(nn.Module):
    """The scan as a module without parameters, which says what it costs; see `selective_scan`."""

    def flops_per_token(self, context: int) -> int:
        """None that are counted: it is elementwise."""
        return 0

    def forward(
        self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return selective_scan(x, dt, a, b, c, state)
