"""AdamWIndependent: its formula, torch's AdamW at a constant rate, a decay that follows the schedule and nothing else."""

from functools import partial

import pytest
import torch
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from promises import by_formula, check_promises, learn, moments
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from blagpt_pl.optim.adamw_independent import AdamWIndependent
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.schedule import Trapezoid

LR, DECAY = 0.05, 0.02
FACTORY = partial(AdamWIndependent, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
SCHEDULES = {"constant": lambda step: 1.0, "trapezoid": Trapezoid(STEPS, 5, 10).factor}


def formula(w: Tensor, g: Tensor, state: dict, t: int, factor: float, decay: float | None = None) -> Tensor:
    m, v = moments(g, state, t, 0.9, 0.95)
    return w - DECAY * (factor if decay is None else decay) * w - LR * factor * m / (v.sqrt() + 1e-8)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("factor", SCHEDULES.values(), ids=SCHEDULES)
def test_it_is_its_formula(factor: object, fused: bool) -> None:
    found = trajectory(partial(FACTORY, fused=fused), factor=factor)
    assert gap(found, by_formula(formula, factor)) < 1e-10


def test_a_decay_beside_the_schedule_is_seen() -> None:
    found = trajectory(FACTORY, factor=SCHEDULES["trapezoid"])
    for wrong in (1.0, LR):  # the seed's, torch's at this rate
        assert gap(found, by_formula(partial(formula, decay=wrong), SCHEDULES["trapezoid"])) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("factor", SCHEDULES.values(), ids=SCHEDULES)
def test_it_is_torchs_with_the_decay_over_the_peak_rate(factor: object, fused: bool) -> None:
    torchs = partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY / LR, fused=fused)
    assert gap(trajectory(partial(FACTORY, fused=fused), factor=factor), trajectory(torchs, factor=factor)) < 1e-14


@settings(deadline=None, max_examples=25)
@given(st.floats(1e-6, 10), st.floats(0, 0.5), st.lists(st.floats(0, 1), min_size=1, max_size=6), st.booleans())
def test_without_gradients_what_is_left_does_not_depend_on_the_rate(
    lr: float, decay: float, factors: list[float], fused: bool
) -> None:
    p = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = AdamWIndependent([p], lr=lr, weight_decay=decay, fused=fused)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*factors, 0.0][step])
    left = 1.0
    for factor in factors:
        p.grad = torch.zeros_like(p)
        optimizer.step()
        schedule.step()
        left *= 1 - decay * factor
    assert p.tolist() == pytest.approx([left] * 3, rel=1e-12)


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_schedule_it_resumes_bit_by_bit(fused: bool) -> None:
    def run(resume_at: int | None) -> list[Tensor]:
        params = parameters(torch.float32)
        build = partial(FACTORY, fused=fused)
        optimizer = build(params)
        schedule = Trapezoid(STEPS, 5, 10).on(optimizer)
        for step in range(STEPS):
            if step == resume_at:
                states = optimizer.state_dict(), schedule.state_dict()
                optimizer = build(params)
                schedule = Trapezoid(STEPS, 5, 10).on(optimizer)
                optimizer.load_state_dict(states[0])
                schedule.load_state_dict(states[1])
            for p, grad in zip(params, gradients(params, step), strict=True):
                p.grad = grad
            optimizer.step()
            schedule.step()
        return params

    whole = run(None)
    for at in (1, 8, 20):
        assert all(torch.equal(a, b) for a, b in zip(whole, run(at), strict=True))


def test_the_step_that_torch_takes_to_load_a_state_moves_nothing() -> None:
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizers = [FACTORY(m.parameters(), weight_decay=0.5) for m in (model, other)]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    before = [p.detach().clone() for p in other.parameters()]
    set_optimizer_state_dict(other, optimizers[1], get_optimizer_state_dict(model, optimizers[0]))
    assert all(torch.equal(p, b) for p, b in zip(other.parameters(), before, strict=True))
    assert [s["step"] for s in optimizers[1].state.values()] == [1, 1]


def test_only_what_a_group_says_decays() -> None:
    model = tiny(optimizer=partial(AdamWIndependent, weight_decay=0.5, fused=True))
    optimizer = model.make_optimizer()
    assert {g["role"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "matrix": 0.5,
        "embedding": 0,
        "vector": 0,
    }
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name] * (0.5 if model.parameter_roles()[name] == "matrix" else 1))


def test_beside_another_optimizer_it_sees_the_schedule() -> None:
    groups = [{"params": [p], "role": role} for p, role in zip(parameters(), ("matrix", "vector"), strict=True)]
    sgd = partial(torch.optim.SGD, lr=0.1)
    optimizer = Composite(groups, matrix=partial(FACTORY, weight_decay=0.5), other=sgd)
    before = groups[0]["params"][0].detach().clone()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    for group in groups:
        group["params"][0].grad = torch.zeros_like(group["params"][0])
    optimizer.step()
    schedule.step()
    assert torch.equal(groups[0]["params"][0], before * 0.75)


@pytest.mark.parametrize("fused", [False, True])
def test_it_keeps_the_promises(fused: bool) -> None:
    check_promises(partial(FACTORY, fused=fused))


@pytest.mark.parametrize("fused", [False, True])
def test_it_learns(fused: bool) -> None:
    losses, largest = learn(tiny(optimizer=partial(AdamWIndependent, lr=3e-3, fused=fused)))
    assert losses[-1] < losses[0] - 1 and largest < 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"AdamWIndependent.lr: 0.0 \(expected more than 0"),
        ({"betas": (0.9,)}, "AdamWIndependent.betas"),
        ({"eps": -1.0}, "AdamWIndependent.eps"),
        ({"weight_decay": 1.0}, r"AdamWIndependent.weight_decay: 1.0 .*which is not scaled by lr"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWIndependent(parameters(), **values)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_after_the_first_makes_no_tensor_of_a_number(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device each one would be a copy from the host, for which the step waits."""
    params = parameters(torch.float32)
    optimizer = FACTORY(params, fused=fused)
    for p, grad in zip(params, gradients(params, 0), strict=True):
        p.grad = grad
    optimizer.step()
    monkeypatch.setattr(torch, "tensor", None)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 2]


def test_the_factor_is_that_of_a_groups_own_peak() -> None:
    """0.5 of each group's learning rate is half of the decay, whatever that rate is."""
    params = [Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = AdamWIndependent(
        [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.5}], lr=0.01, weight_decay=0.2
    )
    LambdaLR(optimizer, lambda step: 0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(p.tolist() == pytest.approx([0.9] * 3, rel=1e-12) for p in params)
