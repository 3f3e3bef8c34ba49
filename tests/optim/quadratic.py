"""A problem on which optimizers are compared: a noisy quadratic bowl over a matrix and a vector, the same every time."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

STEPS = 25
Factory = Callable[[Iterable], Optimizer]


def parameters(dtype: torch.dtype = torch.float64, shapes: tuple = ((12, 8), (8,))) -> list[Parameter]:
    """A matrix and a vector, or tensors of other shapes."""
    generator = torch.Generator().manual_seed(1)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[Parameter], step: int) -> list[Tensor]:
    """Of the bowl Σ c (w - 1)² / 2 with curvatures c between 0.1 and 10, and noise; a function of the weights and the step."""
    generator = torch.Generator().manual_seed(100 + step)
    found = []
    for p in params:
        c = torch.logspace(-1, 1, p.numel(), dtype=torch.float64).reshape(p.shape)
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        found.append((c * (p.detach().double() - 1) + 0.3 * noise).to(p.dtype))
    return found


def trajectory(
    factory: Factory,
    steps: int = STEPS,
    dtype: torch.dtype = torch.float64,
    shapes: tuple = ((12, 8), (8,)),
    grouped: Callable[[list[Parameter]], Iterable] = list,
    factor: Callable[[int], float] = lambda step: 1.0,
    reuse: bool = False,
) -> list[list[Tensor]]:
    """The weights after each step.

    Args:
        factory: params or groups -> optimizer.
        steps: how many.
        dtype: of the weights.
        shapes: of the weights.
        grouped: the weights -> what the factory is given.
        factor: of the learning rate, at a step numbered from 0; by torch's LambdaLR.
        reuse: whether gradients keep their memory from step to step, as under DDP's bucket views.
    """
    params = parameters(dtype, shapes)
    optimizer = factory(grouped(params))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    seen = []
    for step in range(steps):
        for p, grad in zip(params, gradients(params, step), strict=True):
            if reuse and p.grad is not None:
                p.grad.copy_(grad)
            else:
                p.grad = grad
        optimizer.step()
        schedule.step()
        seen.append([p.detach().clone() for p in params])
    return seen


def gap(one: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """The largest difference between two trajectories."""
    assert len(one) == len(other)
    return max(
        float((a.double() - b.double()).abs().max())
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )
