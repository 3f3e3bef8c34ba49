"""Losses whose gradients are made together with their values, in the forward pass; backward only scales them.

Why      what the gradients are made from (the logits of one chunk, the activations of one head) is let go before the next
         one is begun, and nothing is computed twice
Limit    no second derivative: what is stored would count as a constant, so one is refused
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import wide

Make = Callable[[], tuple[Tensor, Sequence[Tensor | None]]]


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make: Make, *inputs: Tensor):
        parts, grads = make()
        ctx.save_for_backward(*grads)
        ctx.dtypes = [t.dtype for t in inputs]
        ctx.mark_non_differentiable(parts)
        return parts.sum(), parts

    @staticmethod
    def backward(ctx, grad: Tensor, _: Tensor):
        return None, *given_back(ctx.saved_tensors, ctx.dtypes, grad)


def given_back(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], scale: Tensor
) -> tuple[Tensor | None, ...]:
    """Stored gradients times a scale, each in its input's dtype; in 16 bit the scale would be rounded.

    Raises:
        RuntimeError: within create_graph=True, where what was stored would count as constant, silently.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "losses: gradients that were made in the forward pass have no second derivative; fix: differentiate "
            "losses.next_token.full instead"
        )
    return tuple(None if g is None else (wide(g) * scale).to(dtype) for g, dtype in zip(grads, dtypes, strict=True))


def stored(make: Make, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """A loss that is a sum of parts.

    Args:
        make: called once, without gradients enabled; gives the parts (n,), and for each input the gradient of their sum,
            or None where the sum does not depend on it.
        inputs: what the loss is a function of.

    Returns:
        The sum, which is differentiated; and the parts, which no gradient flows through.
    """
    return _Stored.apply(make, *inputs)


def gradients(loss: Tensor, by: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a scalar by each tensor, None where it does not depend on it; outside autocast, as backward runs."""
    with without_autocast(loss.device):
        return torch.autograd.grad(loss, by, allow_unused=True)


def unkept(leaf: Tensor) -> Tensor:
    """A leaf as its graph should read it. Autocast keeps its cast of a leaf, and so all behind the leaf, until it ends."""
    return leaf.view_as(leaf)
