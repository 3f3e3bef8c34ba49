"""CAdamW: its formula, heavyball's, AdamW where all agrees, bounded where little does."""

from functools import partial

import pytest
import torch
from helpers import tiny
from promises import by_formula, check_promises, learn, moments
from quadratic import gap, parameters, trajectory
from torch import Tensor
from torch.nn import Parameter

from blagpt_pl.optim.c_adamw import CAdamW, agreeing
from blagpt_pl.optim.schedule import Trapezoid

LR, DECAY = 0.05, 0.1
VALUES = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": DECAY}
FACTORY = partial(CAdamW, **VALUES)
FACTOR = Trapezoid(25, 5, 10).factor


def formula(w: Tensor, g: Tensor, state: dict, t: int, factor: float, mask: str = "m g") -> Tensor:
    m, v = moments(g, state, t, 0.9, 0.95)
    agrees = {"m g": m * g, "m m": m * m}[mask] > 0
    share = max(float(agrees.double().mean()), 1e-3)
    update = torch.where(agrees, m / (v.sqrt() + 1e-8), 0) / share
    return w - LR * factor * DECAY * w - LR * factor * update


def test_it_is_its_formula() -> None:
    found = trajectory(FACTORY, factor=FACTOR)
    assert gap(found, by_formula(formula, FACTOR)) < 1e-10
    assert gap(found, by_formula(partial(formula, mask="m m"), FACTOR)) > 1e-3  # C-Optim's foreach path: no mask at all


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_heavyballs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    heavyball = pytest.importorskip("heavyball")
    monkeypatch.setattr(heavyball.utils, "compile_mode", None)
    theirs = partial(heavyball.AdamW, **VALUES, eps=1e-8)
    found = trajectory(FACTORY, dtype=dtype)
    assert gap(found, trajectory(partial(theirs, caution=True), dtype=dtype)) < 8e-7
    assert gap(found, trajectory(partial(theirs, caution=False), dtype=dtype)) > 1e-3


def test_where_all_agree_it_is_adamw() -> None:
    ours, torchs = parameters(), parameters()
    optimizers = FACTORY(ours), torch.optim.AdamW(torchs, **VALUES)
    for step in range(1, 11):
        for p, q in zip(ours, torchs, strict=True):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=p.dtype) + 0.5).reshape(p.shape) * step
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert max((p - q).abs().max() for p, q in zip(ours, torchs, strict=True)) < 1e-13


def test_what_disagrees_only_decays_and_the_rest_makes_up_for_it() -> None:
    p = Parameter(torch.ones(8, dtype=torch.float64))
    plain = Parameter(torch.ones(8, dtype=torch.float64))
    optimizers = FACTORY([p]), torch.optim.AdamW([plain], **VALUES)
    for sign in (1.0, -1.0):  # the second gradient is small: momenta keep their sign
        before, plain_before = p.detach().clone(), plain.detach().clone()
        grad = torch.ones(8, dtype=torch.float64)
        grad[:6] *= sign
        for q in (p, plain):
            q.grad = grad * (1.0 if sign > 0 else 0.1)
        for optimizer in optimizers:
            optimizer.step()
    kept = 1 - LR * DECAY
    assert torch.equal(p[:6], before[:6] * kept)
    moved, usual = p - before * kept, plain - plain_before * kept
    assert torch.allclose(moved[6:], usual[6:] * 8 / 2, rtol=1e-12)


def test_a_table_of_which_little_is_seen_does_not_explode() -> None:
    """The seed's n / (Σ φ + 1) makes that step 25,000 times as long."""
    p = Parameter(torch.zeros(50_000, 2))
    optimizer = CAdamW([p], lr=1e-3)
    p.grad = torch.zeros_like(p)
    p.grad[7] = 1.0
    optimizer.step()
    assert p[7].abs().max() <= 1e-3 * 1e3 * (1 + 1e-5)
    assert not p[:7].any() and not p[8:].any()


def test_small_numbers_agree_too() -> None:
    g = torch.tensor([1e-24, -1e-24, 0.0])
    assert not (g * g).any()
    assert agreeing([0.1 * g], [g])[0].tolist() == [1, 1, 0]
    assert agreeing([-0.1 * g], [g])[0].tolist() == [0, 0, 0]


def test_it_keeps_the_promises() -> None:
    check_promises(FACTORY)


def test_it_learns() -> None:
    losses, largest = learn(tiny(optimizer=partial(CAdamW, lr=3e-3)))
    assert losses[-1] < losses[0] - 1 and largest < 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "CAdamW.lr: -1.0"),
        ({"betas": (0.9, 1.0)}, "CAdamW.betas: "),
        ({"betas": (0.0, 0.9)}, r"CAdamW.betas\[0\]: 0.0 .*nothing can disagree"),
        ({"weight_decay": -1.0}, "CAdamW.weight_decay"),
        ({"floor": 0.0}, "CAdamW.floor: 0.0 .expected a share"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CAdamW(parameters(), **values)
