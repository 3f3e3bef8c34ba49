"""The selective scan of Mamba-1: for each channel a state of N numbers, each with a decay of its own that the input sets.

Source   Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, eq. (2a) and
         Algorithm 2, with A by zero-order hold and B by Euler's rule, as the authors' code has it
Formula  h_t = exp(dt_t a) ⊙ h_{t-1} + dt_t x_t b_t;  y_t = Σ_n h_{t,n} c_{t,n};  h (I, N), a (I, N) < 0, b and c (N,)
How      on a CPU position by position (scan_serial.py), on CUDA with chunks side by side (scan_parallel.py), compiled on first use and
         shared by all layers. No decay is ever divided by, every exponent is at most 0: nothing overflows, however strong it is. The
         gradients are written out. Forward and backward are one operation of torch each (`torch.library`): a compiled block has them as
         two nodes of its graph, not as thousands
Cost     O(T I N), elementwise. Kept for the backward pass: the inputs, and a state every L positions; it computes those between again.
         `SelectiveScan` says that it has no FLOPs, as all that is elementwise (nn/flop_rules.py)
Kernels  flash-linear-attention has none; the authors' package mamba_ssm, which is no dependency, is not used
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.compiled import APART
from blagpt_pl.nn.recurrent import scan_parallel, scan_serial

CHUNK = 32  # positions between two states that are kept


def form(device: torch.device, tokens: int) -> str:
    """How it runs there, in words."""
    return f"chunks of {min(CHUNK, tokens)}" if device.type == "cuda" else "one position after the other"


@cache
def fused(function: Callable) -> Callable:
    """The function as few kernels, compiled on first use, once for each shape, whatever calls it; eager where torch was told so."""
    return torch.compile(function, fullgraph=True, dynamic=False, **APART)


def run(name: str, *given: Tensor | int) -> tuple[Tensor, ...] | list[Tensor]:
    """The function of this name, `forwards` or `backwards`, in the form for where the tensors are."""
    is_cuda = given[0].is_cuda
    function = getattr(scan_parallel if is_cuda else scan_serial, name)
    return fused(function)(*given) if is_cuda else function(*given)


@torch.library.custom_op("blagpt::selective_scan", mutates_args=())
def scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`forwards` as one operation, of contiguous tensors."""
    y, last, first = run("forwards", x, dt, a, b, c, state, size)
    return y, last, first


@torch.library.custom_op("blagpt::selective_scan_backward", mutates_args=())
def scan_backward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, by_y: Tensor, by_state: Tensor, size: int
) -> list[Tensor]:
    """`backwards` as one operation."""
    return list(run("backwards", x, dt, a, b, c, first, by_y, by_state, size))


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
