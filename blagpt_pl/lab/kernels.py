"""Attention as a GPU's fused kernel keeps it, for tensors on the CPU that have no data.

Why   torch's CPU kernels make the T × T matrix where the values have another width than the keys, where there is dropout and
      where scores are soft-capped; a GPU has fused kernels for these
Keeps q, k, v, the result, and the logarithm of each query's normaliser in float32
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("blagpt::attention", mutates_args=())
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K') in the order of (B, T, H, K'), and (B, H, T)."""
    raise NotImplementedError("blagpt::attention stands for a kernel and has shapes only")


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, t, _ = q.shape
    return q.new_empty(b, t, h, v.shape[-1]).transpose(1, 2), q.new_empty((b, h, t), dtype=torch.float32)


@torch.library.custom_op("blagpt::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    raise NotImplementedError("blagpt::attention_backward stands for a kernel and has shapes only")


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(grad, *ctx.saved_tensors)


attention.register_autograd(_backward, setup_context=_keep)


def fused(q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
    """In the place of every function of q, k and v that a GPU has a fused kernel for."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    return attention(q, k, v)[0]


@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Within, every attention that has a fused kernel on a GPU keeps what that kernel keeps."""
    with (
        patch.object(F, "scaled_dot_product_attention", fused),
        patch("blagpt_pl.nn.attention.core_softcap.eager", fused),
        patch("blagpt_pl.nn.attention.core_window.banded", fused),
        patch("blagpt_pl.nn.attention.core_meta.banded", fused),
    ):
        yield
