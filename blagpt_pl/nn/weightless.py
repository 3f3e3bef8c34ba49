"""A model without its weights: what it computes can be followed, on tensors that have shapes and no elements.

How      every tensor of a copy is on torch's meta device: parameters, buffers, and those that a module merely holds
Cost     none of the model's memory, some tens of milliseconds
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def weightless(model: nn.Module) -> nn.Module:
    """The copy: tied where the model is tied, frozen where it is frozen, and compiled nowhere.

    Args:
        model: on any device; left as it is. One that is sharded cannot be copied.
    """
    memo: dict[int, object] = {id(p): nn.Parameter(empty(p), p.requires_grad) for p in model.parameters()}
    with _Emptied():
        return copy.deepcopy(model, memo).to("meta")


def empty(x: Tensor) -> Tensor:
    """Its shape and type, without elements."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta")


class _Emptied(TorchFunctionMode):
    """While it is on, a copy of a tensor has no elements."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        memo[id(x)] = empty(x).requires_grad_(x.requires_grad)
        return memo[id(x)]
