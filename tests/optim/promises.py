"""What every optimizer of the house promises, checked on any of them, and a way to write one down as a formula."""

import io
from collections.abc import Callable

import torch
from helpers import batch
from quadratic import STEPS, Factory, gap, gradients, parameters, trajectory
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

Formula = Callable[[Tensor, Tensor, dict, int, float], Tensor]


def by_formula(formula: Formula, factor: Callable[[int], float] = lambda step: 1.0) -> list[list[Tensor]]:
    """A trajectory of tests/optim/quadratic.py, one tensor after the other.

    Args:
        formula: weights, gradient, state (a dictionary, first empty), step from 1, factor -> the new weights.
        factor: of the learning rate, at a step numbered from 0.
    """
    params, seen = parameters(), []
    states: list[dict] = [{} for _ in params]
    for step in range(STEPS):
        with torch.no_grad():
            for p, g, state in zip(params, gradients(params, step), states, strict=True):
                p.copy_(formula(p.clone(), g, state, step + 1, factor(step)))
        seen.append([p.detach().clone() for p in params])
    return seen


def moments(g: Tensor, state: dict, t: int, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Adam's means of g and g² after step t, both corrected."""
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g * g
    return state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)


def check_promises(factory: Factory) -> None:
    """Memory of gradients, resuming, dtypes, shapes, groups, closures, gradients that are missing."""
    assert gap(trajectory(factory), trajectory(factory, reuse=True)) == 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check_resume(factory, dtype)
    shapes = ((), (1,), (0, 3), (4, 3), (2, 3, 2))
    exact = trajectory(factory, shapes=shapes, grouped=lambda params: params)
    rough = trajectory(factory, shapes=shapes, dtype=torch.float32)
    assert max((a - b).abs().max() for a, b in zip(exact[-1], rough[-1], strict=True) if a.numel()) < 1e-3
    check_groups(factory)
    check_closure(factory)
    check_no_waiting(factory)


def descend(optimizer: Optimizer, params: list[Parameter], steps: range) -> list[Tensor]:
    """The weights after steps on the bowl; gradients must come out of a step as they went in."""
    for step in steps:
        grads = gradients(params, step)
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
    return [p.detach().clone() for p in params]


def check_resume(factory: Factory, dtype: torch.dtype) -> None:
    """Saved and loaded in the middle, as plain tensors, it goes on bit by bit."""
    params = parameters(dtype)
    optimizer = factory(params)
    others = [Parameter(w) for w in descend(optimizer, params, range(7))]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = factory(others)
    other.load_state_dict(torch.load(file, weights_only=True))
    ends = descend(optimizer, params, range(7, 14)), descend(other, others, range(7, 14))
    assert all(torch.equal(a, b) and a.dtype == dtype and a.isfinite().all() for a, b in zip(*ends, strict=True))


def check_groups(factory: Factory) -> None:
    """What a group says itself holds; keys that are not the optimizer's stay; without a gradient nothing moves."""
    matrix, vector, idle = *parameters(), Parameter(torch.ones(3))
    optimizer = factory([{"params": [matrix, idle], "role": "matrix", "splits": [(12,), (3,)], "lr": 0.0123},
                         {"params": [vector], "role": "vector", "weight_decay": 0.0}])  # fmt: skip
    descend(optimizer, [matrix, vector], range(3))
    assert torch.equal(idle, torch.ones(3)) and idle not in optimizer.state
    assert [g["role"] for g in optimizer.param_groups] == ["matrix", "vector"]
    assert optimizer.param_groups[0]["splits"] == [(12,), (3,)]
    assert [g["lr"] == 0.0123 for g in optimizer.param_groups] == [True, False]


def check_closure(factory: Factory) -> None:
    """It runs once, with gradients on, before anything else happens to the weights."""
    params = parameters()
    optimizer = factory(params)
    descend(optimizer, params, range(3))
    seen = []
    before = [p.detach().clone() for p in params]

    def closure() -> float:
        seen.append(torch.is_grad_enabled() and all(torch.equal(p, b) for p, b in zip(params, before, strict=True)))
        for p, grad in zip(params, gradients(params, 3), strict=True):
            p.grad = grad
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert seen == [True]
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def check_no_waiting(factory: Factory) -> None:
    """A step asks for no number of the weights' device: where there are none, it goes through."""
    params = [Parameter(torch.empty(shape, device="meta")) for shape in ((4, 3), (3,), ())]
    optimizer = factory(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


def learn(model: nn.Module, steps: int = 30) -> tuple[list[float], float]:
    """The losses of a model that trains on one batch, and the largest of its weights at the end."""
    optimizer = model.make_optimizer()
    inputs, targets = batch(model, 8)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.objective(inputs, targets)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, max(float(p.detach().abs().max()) for p in model.parameters())
