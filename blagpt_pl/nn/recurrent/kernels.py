"""The Triton kernels of flash-linear-attention, where they are installed: the recurrences of Mamba-2 and RWKV-7 on CUDA.

Source   Yang & Zhang 2024, flash-linear-attention (fla-core 0.6): `chunk_simple_gla` for SSD, `chunk_rwkv7` for the delta rule
How      each is one operation of torch (`torch.library`), forward and backward, so that a compiled block has it in its one graph; these
         kernels refuse to be traced themselves. The backward operation runs the kernel's forward again and then its own backward:
         what a kernel keeps for that is no part of its interface. The products go in what autocast says, decays in float32
Where    CUDA, and not float64; elsewhere, and where the package is missing, the parts run their chunked forms, which are the twins of
         these. `kernel(device, dtype, tokens)` of a part says which; so do the log and `result.json`
Cost     one forward of the kernel more, in the backward pass
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from blagpt_pl.nn.autocast import autocast_dtype, without_autocast
from blagpt_pl.nn.base import wide

NAME = "flash-linear-attention"
SLOWEST = -0.6065306597126334  # -e^-½, the strongest log decay of RWKV-7: lets its kernel take chunks of 64

INSTALLED = find_spec("fla") is not None and find_spec("triton") is not None  # without Triton the package is empty

Run = Callable[..., tuple[Tensor, Tensor]]


def available(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the kernels run there, for tensors of this type."""
    return device.type == "cuda" and dtype != torch.float64 and INSTALLED


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    run = import_module("fla.ops.simple_gla").chunk_simple_gla
    return run(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)


def _rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    run = import_module("fla.ops.rwkv7").chunk_rwkv7
    options = {"safe_gate": True, "lower_bound": SLOWEST, "chunk_size": 64}
    return run(r, w, k, v, a, b, scale=1.0, initial_state=state, output_final_state=True, **options)


def _gradients(run: Run, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a kernel by its inputs: its forward again, and its backward."""
    with torch.enable_grad(), without_autocast(inputs[0].device):
        leaves = [t.detach().requires_grad_() for t in inputs]
        return list(torch.autograd.grad(run(*leaves), leaves, grads))


# ---------------------------------------------------------------------- SSD, as one operation


@torch.library.custom_op("blagpt::ssd", mutates_args=())
def _ssd(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, final = _simple_gla(q, k, v, g, state)
    return y.contiguous(), final.contiguous()


@torch.library.custom_op("blagpt::ssd_backward", mutates_args=())
def _ssd_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> list[Tensor]:
    return [d.contiguous() for d in _gradients(_simple_gla, (q, k, v, g, state), (dy, dfinal))]


@_ssd.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


# ---------------------------------------------------------------------- the delta rule, as one operation


@torch.library.custom_op("blagpt::rwkv7", mutates_args=())
def _delta(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, final = _rwkv7(r, w, k, v, a, b, state)
    return y.contiguous(), final.contiguous()


@torch.library.custom_op("blagpt::rwkv7_backward", mutates_args=())
def _delta_backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, dy: Tensor, dfinal: Tensor
) -> list[Tensor]:
    return [d.contiguous() for d in _gradients(_rwkv7, (r, w, k, v, a, b, state), (dy, dfinal))]


@_delta.register_fake
def _(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), state.new_empty(state.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs)


def _differentiable(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> None:
    """Tell torch that one operation has its gradients by the other, which takes the same inputs and theirs of the outputs."""

    @backward.register_fake
    def _(*given: Tensor) -> list[Tensor]:
        return [t.new_empty(t.shape) for t in given[:-2]]

    def by_inputs(ctx: torch.autograd.function.FunctionCtx, dy: Tensor, dfinal: Tensor) -> tuple[Tensor, ...]:
        return tuple(backward(*ctx.saved_tensors, dy.contiguous(), dfinal.contiguous()))

    forward.register_autograd(by_inputs, setup_context=_keep)


_differentiable(_ssd, _ssd_backward)
_differentiable(_delta, _delta_backward)


# ---------------------------------------------------------------------- what the parts call


def products(*tensors: Tensor) -> list[Tensor]:
    """Contiguous, and all in what autocast makes products in; where it is off, in the first one's dtype."""
    dtype = autocast_dtype(tensors[0].device) or tensors[0].dtype
    return [t.to(dtype).contiguous() for t in tensors]


def ssd(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mamba-2's recurrence by the kernel; as `nn.recurrent.ssd.ssd`.

    Args:
        x: Δ x (B, T, H, P).
        log_decay: Δ A (B, T, H).
        b, c: (B, T, G, N).
        state: (B, H, P, N), or None for zeros.

    Returns:
        y (B, T, H, P) and the state (B, H, P, N) in float32.
    """
    heads = x.shape[2]
    b, c = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (b, c))  # (B, T, H, N)
    q, k, v = products(c, b, x)
    shape = (len(x), heads, b.shape[-1], x.shape[-1])  # (B, H, N, P)
    start = x.new_zeros(shape, dtype=torch.float32) if state is None else wide(state).mT.contiguous()
    y, final = _ssd(q, k, v, wide(log_decay).contiguous(), start)
    return y.to(x.dtype), final.mT


def dplr(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence by the kernel; as `nn.recurrent.delta.dplr`.

    Args:
        r, log_w, k, a, b: (B, T, H, K); log_w between -e^-½ and 0.
        v: (B, T, H, V).
        state: (B, H, K, V), or None for zeros.

    Returns:
        y (B, T, H, V) and the state (B, H, K, V) in float32.
    """
    shape = (len(r), r.shape[2], r.shape[-1], v.shape[-1])
    start = r.new_zeros(shape, dtype=torch.float32) if state is None else wide(state).contiguous()
    r, k, values, a, b = products(r, k, v, a, b)
    y, final = _delta(r, wide(log_w).contiguous(), k, values, a, b, start)
    return y.to(v.dtype), final
