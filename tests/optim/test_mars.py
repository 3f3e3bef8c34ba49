"""MARS: equal to the formula and to another's code; a copy of each gradient is kept; vectors are AdamW's."""

import io
from functools import partial

import pytest
import torch
from helpers import batch, tiny
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch.nn import Parameter

from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.mars import MARS
from blagpt_pl.optim.schedule import Trapezoid

SHAPES = ((12, 8), (8,), (2, 3, 4), ())
VALUES = {"lr": 0.05, "weight_decay": 0.1}


def by_role(params: list[Parameter]) -> list[dict]:
    """A group for each role present."""
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "role": "matrix", "weight_decay": 0.1, "splits": [(1,)]},
        {"params": [p for p in params if p.ndim < 2], "role": "vector", "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def naive(
    small: float = 1.0,
    shapes: tuple = SHAPES,
    lr: float = 0.05,
    betas: tuple = (0.95, 0.99),
    gamma: float = 0.025,
    vector_lr: float = 0.05,
    vector_betas: tuple = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    spoiled: str = "",
) -> list:
    """Step by step and tensor by tensor; gradients of matrices times `small`.

    Spoiled: `zero`, the previous gradient is 0 in the first step; `alias`, it is always the gradient; `vectors`, corrected,
    too; `theirs`, as pytorch_optimizer has it.
    """
    params = parameters(shapes=shapes)
    m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
    before: dict[int, torch.Tensor] = {}
    seen = []
    for t in range(1, STEPS + 1):
        for n, (p, g) in enumerate(zip(params, gradients(params, t - 1), strict=True)):
            is_vector = p.ndim < 2
            rate, (beta1, beta2), decay = (vector_lr, vector_betas, 0.0) if is_vector else (lr, betas, weight_decay)
            g, c = (g, g) if is_vector else (g * small, g * small)
            if not is_vector or spoiled == "vectors":
                old = before.get(n, torch.zeros_like(g) if spoiled in ("zero", "theirs") else g)
                c = g + gamma * beta1 / (1 - beta1) * (g - (g if spoiled == "alias" else old))
                c = c / max(1.0, c.square().sum().sqrt().item())
                before[n] = g
            m[n] = beta1 * m[n] + (1 - beta1) * c
            v[n] = beta2 * v[n] + (1 - beta2) * c * c
            size = (v[n] / (1 - beta2**t)).sqrt() + eps
            if spoiled == "theirs":
                size = ((v[n] + 1e-15).sqrt() + eps) / (1 - beta2**t) ** 0.5
            p.data -= rate * ((m[n] / (1 - beta1**t)) / size + decay * p.data)
        seen.append([p.detach().clone() for p in params])
    return seen


class Scaled:
    """A factory whose optimizer sees the gradients of matrices multiplied by a number, written back into their memory."""

    def __init__(self, factory: partial, small: float) -> None:
        self.factory, self.small = factory, small

    def __call__(self, groups: list) -> torch.optim.Optimizer:
        optimizer = self.factory(groups)

        def scale(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad.mul_(self.small if p.ndim >= 2 else 1.0)

        optimizer.register_step_pre_hook(scale)
        return optimizer


def ours(small: float = 1.0, **values: object) -> Scaled:
    return Scaled(partial(MARS, **{**VALUES, **values}), small)


run = partial(trajectory, grouped=by_role)


@pytest.mark.parametrize("small", [1.0, 1e-3], ids=["cut to norm 1", "not cut"])
def test_it_is_the_formula(small: float) -> None:
    found = run(ours(small), shapes=SHAPES)
    assert gap(found, naive(small)) < 1e-12
    for spoiled in ("alias", "vectors"):
        assert gap(found, naive(small, spoiled=spoiled)) > 1e-3, spoiled
    values = {"betas": (0.8, 0.9), "gamma": 0.1, "vector_lr": 0.02, "vector_betas": (0.5, 0.6)}
    assert gap(run(ours(small, **values), shapes=SHAPES), naive(small, **values)) < 1e-12


def test_the_first_step_has_no_previous_gradient() -> None:
    assert gap(run(ours(1e-3)), naive(1e-3, shapes=((12, 8), (8,)), spoiled="zero")) > 1e-4
    p = Parameter(torch.zeros(3, 3, dtype=torch.float64))
    p.grad = torch.full((3, 3), 0.1, dtype=torch.float64)
    optimizer = MARS([p])
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["exp_avg"], 0.05 * p.grad, rtol=1e-12)


@pytest.mark.parametrize("small", [1.0, 1e-3], ids=["cut to norm 1", "not cut"])
def test_it_is_another_implementation_but_for_epsilon_and_the_first_step(small: float) -> None:
    """Theirs begins with a previous gradient of 0, and adds 1e-15 to v and ε to its root before the bias correction."""
    theirs = pytest.importorskip("pytorch_optimizer").MARS
    one_d = {"lr_1d": 0.002, "betas_1d": (0.8, 0.9), "weight_decay_1d": 0.0}
    vectors = {"vector_lr": 0.002, "vector_betas": (0.8, 0.9)}
    expected = trajectory(Scaled(partial(theirs, lr=0.005, weight_decay=0.1, **one_d), small))
    twin = partial(naive, small, shapes=((12, 8), (8,)), lr=0.005, **vectors)
    assert gap(twin(spoiled="theirs"), expected) < 1e-12
    if small == 1.0:  # where all gradients are cut, the first step makes no difference
        assert gap(run(ours(lr=0.005, **vectors)), expected) < 1.4e-6


def test_a_group_without_a_role_is_corrected_whatever_its_dimensions() -> None:
    theirs = partial(pytest.importorskip("pytorch_optimizer").MARS, lr=0.005, optimize_1d=True)
    assert gap(trajectory(partial(MARS, lr=0.005)), trajectory(theirs)) < 1.4e-6


@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_gradients_whose_memory_is_used_again_change_nothing(small: float) -> None:
    """The seed keeps the gradient itself: under DDP's bucket views nothing is corrected then."""
    assert gap(run(ours(small), shapes=SHAPES, reuse=True), run(ours(small), shapes=SHAPES)) == 0
    assert gap(run(ours(small), shapes=SHAPES, reuse=True), naive(small, spoiled="alias")) > 1e-3


def test_vectors_are_adamws() -> None:
    groups = lambda params: [{"params": params, "role": "vector"}]
    found = trajectory(partial(MARS, **VALUES, vector_lr=0.02), grouped=groups)
    assert gap(found, trajectory(partial(torch.optim.AdamW, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1))) < 1e-13
    params = parameters()
    optimizer = MARS([{"params": params, "role": "vector"}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_what_a_group_holds_and_a_schedule_scales() -> None:
    model = tiny(optimizer=partial(MARS, lr=0.01, vector_lr=0.004, weight_decay=0.1))
    optimizer = model.make_optimizer()
    groups = {group["role"]: group for group in optimizer.param_groups}
    assert {role: (g["lr"], g["betas"], g.get("gamma"), g["weight_decay"]) for role, g in groups.items()} == {
        "matrix": (0.01, (0.95, 0.99), 0.025, 0.1),
        "embedding": (0.01, (0.95, 0.99), 0.025, 0.0),
        "vector": (0.004, (0.9, 0.95), None, 0.0),
    }
    assert "splits" in groups["matrix"]
    Trapezoid(10, 5, 0).on(optimizer)
    assert [g["lr"] for g in groups.values()] == pytest.approx([0.002, 0.002, 0.0008])
    same = tiny(optimizer=partial(MARS, lr=0.01)).make_optimizer()
    assert {group["lr"] for group in same.param_groups} == {0.01}
    own = MARS([{"params": parameters(), "role": "vector", "lr": 0.3, "betas": (0.1, 0.2)}])
    assert (own.param_groups[0]["lr"], own.param_groups[0]["betas"]) == (0.3, (0.1, 0.2))


def test_it_is_a_member_of_a_composite() -> None:
    model = tiny(
        optimizer=partial(Composite, matrix=partial(torch.optim.SGD, lr=0.1), other=partial(MARS, vector_lr=0.1))
    )
    optimizer = model.make_optimizer()
    model.objective(*batch(model))[0].backward()
    optimizer.step()
    assert {g["role"]: g["lr"] for g in optimizer.param_groups} == {"matrix": 0.1, "embedding": 6e-3, "vector": 0.1}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize("small", [1.0, 1e-3])
def test_in_less_precision_it_stays_near(dtype: torch.dtype, limit: float, small: float) -> None:
    assert gap(run(ours(small), dtype=dtype, shapes=SHAPES), run(ours(small), shapes=SHAPES)) < limit


def test_the_previous_gradient_is_the_one_of_the_last_step_that_had_one() -> None:
    params = [Parameter(torch.zeros(2, 2)) for _ in range(2)]
    optimizer = MARS(params)
    for step in range(3):
        params[0].grad = torch.full((2, 2), float(step))
        params[1].grad = torch.full((2, 2), 7.0) if step == 0 else None
        optimizer.step()
    assert [float(optimizer.state[p]["previous_grad"].mean()) for p in params] == [2.0, 7.0]
    assert [float(p.grad.mean()) if p.grad is not None else None for p in params] == [2.0, None]


def test_saved_and_loaded_it_goes_on_bit_by_bit() -> None:
    params, others = parameters(torch.float32, SHAPES), parameters(torch.float32, SHAPES)
    optimizer = MARS(by_role(params), lr=0.05, vector_lr=0.02)
    for step in range(12):
        if step == 6:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = MARS(by_role(others), lr=0.5, gamma=0.5)
            other.load_state_dict(torch.load(file, weights_only=True))
            for p, q in zip(params, others, strict=True):
                q.data.copy_(p)
        for one, tensors in ((optimizer, params), (other, others)) if step >= 6 else ((optimizer, params),):
            for p, g in zip(tensors, gradients(tensors, step), strict=True):
                p.grad = g
            one.step()
    assert other.param_groups[0]["gamma"] == 0.025 and "gamma" not in other.param_groups[1]
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"MARS.lr: -1.0 \(expected 0 or more\)"),
        ({"betas": (0.9, 0.95, 0.99)}, "MARS.betas"),
        ({"gamma": -0.1}, "MARS.gamma"),
        ({"vector_lr": -1.0}, "MARS.vector_lr"),
        ({"vector_betas": (0.9, 1.0)}, "MARS.vector_betas"),
        ({"eps": -1e-8}, "MARS.eps"),
        ({"weight_decay": -0.1}, "MARS.weight_decay"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARS(
            [{"params": [Parameter(torch.zeros(2, 2))]}, {"params": [Parameter(torch.zeros(2))], "role": "vector"}],
            **values,
        )


def test_vectors_can_stand_still() -> None:
    """0 is a learning rate, and not the lack of one."""
    groups = MARS(by_role(parameters()), lr=0.05, vector_lr=0.0).param_groups
    assert [group["lr"] for group in groups] == [0.05, 0.0]
