"""ADOPT: its formula, where pytorch_optimizer's differs from it, and weights that start at 0."""

from functools import partial

import pytest
import torch
from helpers import tiny
from promises import by_formula, check_promises, descend, learn
from quadratic import gap, parameters, trajectory
from torch import Tensor

from blagpt_pl.optim.adopt import ADOPT
from blagpt_pl.optim.schedule import Trapezoid

LR, DECAY = 0.05, 0.1
FACTORY = partial(ADOPT, lr=LR, weight_decay=DECAY)
FACTOR = Trapezoid(25, 5, 10).factor


def formula(
    w: Tensor, g: Tensor, state: dict, t: int, factor: float, late: int = 1, decays_first: bool = False
) -> Tensor:
    """`late`: by how many steps the bound's count starts after the step's; `decays_first`: whether step 1 decays."""
    keep = 1 - LR * factor * DECAY
    if t == 1:
        state["m"], state["v"] = torch.zeros_like(g), g * g
        return w * keep if decays_first else w
    bound = (t - late) ** 0.25
    u = (g / state["v"].sqrt().clamp(min=1e-6)).clamp(-bound, bound)
    state["m"] = 0.9 * state["m"] + 0.1 * u
    state["v"] = 0.9999 * state["v"] + 0.0001 * g * g
    return w * keep - LR * factor * state["m"]


@pytest.mark.parametrize("factor", [lambda step: 1.0, FACTOR], ids=["constant", "trapezoid"])
def test_it_is_its_formula(factor: object) -> None:
    found = trajectory(FACTORY, factor=factor)
    assert gap(found, by_formula(formula, factor)) < 1e-10
    assert gap(found, by_formula(partial(formula, late=0), factor)) > 1e-3
    assert gap(found, by_formula(partial(formula, decays_first=True), factor)) > 1e-4


def test_pytorch_optimizers_clips_later_and_decays_sooner() -> None:
    theirs = pytest.importorskip("pytorch_optimizer").ADOPT
    decaying = partial(theirs, lr=LR, weight_decay=DECAY, weight_decouple=True)
    found = trajectory(decaying)
    assert gap(found, by_formula(partial(formula, late=0, decays_first=True))) < 1e-12
    assert gap(found, trajectory(FACTORY)) > 1e-2
    ours_told = partial(theirs, lr=LR, clip_lambda=lambda step: (step - 1) ** 0.25)
    assert gap(trajectory(ours_told), trajectory(partial(ADOPT, lr=LR))) < 1e-14
    unbounded = partial(theirs, lr=LR, clip_lambda=None)
    assert gap(trajectory(unbounded), trajectory(partial(ADOPT, lr=LR, clip=None))) < 1e-14


def test_the_first_step_moves_nothing_and_each_parameter_has_its_own() -> None:
    matrix, vector = parameters()
    before = [matrix.detach().clone(), vector.detach().clone()]
    optimizer = FACTORY([matrix, vector])
    descend(optimizer, [matrix], range(1))
    assert torch.equal(matrix, before[0]) and vector not in optimizer.state
    descend(optimizer, [matrix, vector], range(1, 2))
    assert not torch.equal(matrix, before[0]) and torch.equal(vector, before[1])
    descend(optimizer, [matrix, vector], range(2, 3))
    assert not torch.equal(vector, before[1])
    assert [int(optimizer.state[p]["step"]) for p in (matrix, vector)] == [3, 2]


def test_a_gradient_after_none_is_a_step_of_the_rate() -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = ADOPT([p], lr=0.01, betas=(0.0, 0.9999))
    for grad in (0.0, 5.0):
        p.grad = torch.full_like(p, grad)
        optimizer.step()
    assert p.tolist() == pytest.approx([-0.01] * 3)


def test_it_learns_from_projections_at_zero_and_without_the_clip_explodes() -> None:
    found = []
    for clip in (0.25, None):
        torch.manual_seed(0)
        found.append(learn(tiny(optimizer=partial(ADOPT, lr=3e-3, clip=clip))))
    (losses, largest), (lost, exploded) = found
    assert losses[-1] < losses[0] - 1 and largest < 2
    assert not exploded < 20 and not lost[-1] < losses[-1] + 1


def test_it_keeps_the_promises() -> None:
    check_promises(FACTORY)
    check_promises(partial(FACTORY, clip=None))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "ADOPT.lr: -1.0"),
        ({"betas": (0.9, 0.95, 0.99)}, "ADOPT.betas: "),
        ({"eps": 0.0}, "ADOPT.eps: 0.0 .expected more than 0"),
        ({"weight_decay": -1.0}, "ADOPT.weight_decay"),
        ({"clip": -0.25}, "ADOPT.clip: -0.25 .expected a power"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADOPT(parameters(), **values)
