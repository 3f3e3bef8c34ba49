"""torch's own optimizers, as the overlays use them, are the formulas of their pages."""

from functools import partial
from math import sqrt

import pytest
import torch
from promises import by_formula, moments
from quadratic import gap, trajectory
from torch import Tensor

LR, DECAY, BETAS, EPS = 0.05, 0.1, (0.9, 0.95), 1e-8


def adam(w: Tensor, g: Tensor, state: dict, t: int, factor: float) -> Tensor:
    m, v = moments(g, state, t, *BETAS)
    return w - factor * LR * m / (v.sqrt() + EPS)


def adamw(w: Tensor, g: Tensor, state: dict, t: int, factor: float) -> Tensor:
    return adam(w * (1 - factor * LR * DECAY), g, state, t, factor)


def radam(w: Tensor, g: Tensor, state: dict, t: int, factor: float) -> Tensor:
    m, v = moments(g, state, t, *BETAS)
    w = w * (1 - factor * LR * DECAY)
    most = 2 / (1 - BETAS[1]) - 1
    now = most - 2 * t * BETAS[1] ** t / (1 - BETAS[1] ** t)
    if now <= 5:
        return w - factor * LR * m
    r = sqrt((now - 4) * (now - 2) * most / ((most - 4) * (most - 2) * now))
    return w - factor * LR * r * m / (v.sqrt() + EPS)


ROWS = {
    "adam": (partial(torch.optim.Adam, lr=LR, betas=BETAS, fused=True), adam),
    "adamw": (partial(torch.optim.AdamW, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True), adamw),
    "radam": (partial(torch.optim.RAdam, lr=LR, betas=BETAS, weight_decay=DECAY, decoupled_weight_decay=True), radam),
}


@pytest.mark.parametrize("name", ROWS)
def test_they_are_what_their_pages_say(name: str) -> None:
    factory, formula = ROWS[name]

    def factor(step: int) -> float:
        return 1 / (1 + step)

    tolerance = 1e-6 if name == "radam" else 1e-12  # torch adds ε to √v before, not after, it corrects v
    assert gap(trajectory(factory), by_formula(formula)) < tolerance
    assert gap(trajectory(factory, factor=factor), by_formula(formula, factor)) < tolerance
    others = [other for one, (_, other) in ROWS.items() if one != name]
    assert all(gap(trajectory(factory), by_formula(other)) > 1e-3 for other in others)
