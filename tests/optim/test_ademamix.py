"""AdEMAMix: equal to the formula and to another's code; what its warm-ups do; saved and loaded it goes on."""

import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch.nn import Parameter

from blagpt_pl.optim.ademamix import AdEMAMix, half_life, slow_beta

SHAPES = ((12, 8), (8,), (), (2, 3, 4))
VALUES = {"lr": 0.05, "betas": (0.9, 0.999, 0.99), "alpha": 5.0, "weight_decay": 0.1}
WARMUPS = pytest.mark.parametrize("warmup", [None, 10, 100])


def naive(
    steps: int = STEPS,
    shapes: tuple = SHAPES,
    lr: float = 1e-3,
    betas: tuple = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    warmup: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    divided: bool = False,
) -> list:
    """Step by step and tensor by tensor; `divided` spoils it as the seed does: the slow mean is divided by 1 - β1^t, too."""
    params = parameters(shapes=shapes)
    m1, m2, v = ([torch.zeros_like(p) for p in params] for _ in range(3))
    seen = []
    for t in range(1, steps + 1):
        beta1, beta2, beta3 = betas
        alpha_t = alpha
        if warmup is not None and t < warmup:
            alpha_t = alpha * t / warmup
            lives = [math.log(0.5) / math.log(beta) for beta in (beta1, beta3)]
            beta3 = 0.5 ** (1 / (lives[0] + (lives[1] - lives[0]) * t / warmup))
        for n, (p, g) in enumerate(zip(params, gradients(params, t - 1), strict=True)):
            m1[n] = beta1 * m1[n] + (1 - beta1) * g
            m2[n] = beta3 * m2[n] + (1 - beta3) * g
            v[n] = beta2 * v[n] + (1 - beta2) * g * g
            slow = m2[n] / (1 - beta1**t) if divided else m2[n]
            direction = (m1[n] / (1 - beta1**t) + alpha_t * slow) / ((v[n] / (1 - beta2**t)).sqrt() + eps)
            p.data -= lr * (direction + weight_decay * p.data)
        seen.append([p.detach().clone() for p in params])
    return seen


@WARMUPS
def test_it_is_the_formula(warmup: int | None) -> None:
    found = trajectory(partial(AdEMAMix, **VALUES, warmup=warmup), shapes=SHAPES)
    assert gap(found, naive(**VALUES, warmup=warmup)) < 1e-12
    assert gap(found, naive(**VALUES, warmup=warmup, divided=True)) > 1e-3


@WARMUPS
def test_it_is_another_implementation(warmup: int | None) -> None:
    theirs = pytest.importorskip("pytorch_optimizer").AdEMAMix
    found = trajectory(partial(AdEMAMix, **VALUES, warmup=warmup))
    expected = trajectory(partial(theirs, **VALUES, weight_decouple=True, t_alpha_beta3=warmup))
    assert gap(found, expected) < 1e-13
    assert gap(found, trajectory(partial(AdEMAMix, **VALUES, warmup=50))) > 1e-3


def test_almost_without_its_slow_mean_it_is_adamw() -> None:
    values = {"lr": 0.05, "eps": 1e-6, "weight_decay": 0.1}
    found = trajectory(partial(AdEMAMix, **values, betas=(0.9, 0.95, 0.99), alpha=1e-30))
    assert gap(found, trajectory(partial(torch.optim.AdamW, **values, betas=(0.9, 0.95)))) < 1e-13


@given(st.floats(0.0, 0.99), st.floats(0.991, 0.9999), st.integers(2, 300), st.data())
def test_the_half_life_grows_evenly(start: float, end: float, warmup: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(1, warmup))
    expected = half_life(start) + (half_life(end) - half_life(start)) * t / warmup
    assert half_life(slow_beta(start, end, t / warmup)) == pytest.approx(expected)
    assert 0.5 == pytest.approx(slow_beta(start, end, t / warmup) ** expected)
    assert slow_beta(start, end, 1.0) == end


def test_the_first_step_is_as_long_as_adams() -> None:
    """The slow mean begins at 0 and is not divided: of g it adds α (1 - β3), ten times less than the seed's."""
    p = Parameter(torch.zeros(4, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -2.0, 1e-3, 5.0], dtype=torch.float64)
    AdEMAMix([p], lr=0.1, alpha=5.0, eps=0.0).step()
    assert torch.allclose(p, -0.1 * (1 + 5 * (1 - 0.9999)) * p.grad.sign(), rtol=1e-12)


def test_a_parameter_that_comes_later_is_warmed_up_from_its_own_first_step() -> None:
    late, other, alone = (Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3))
    both, one = AdEMAMix([other, late], lr=0.1, warmup=8), AdEMAMix([alone], lr=0.1, warmup=8)
    for step in range(9):
        for p in (other, late, alone):
            p.grad = gradients([p], step)[0] if p is other or step >= 4 else None
        both.step()
        one.step()
    assert torch.equal(late, alone) and not torch.equal(late, other)
    assert (int(both.state[late]["step"]), int(both.state[other]["step"])) == (5, 9)


def test_gradients_whose_memory_is_used_again_change_nothing() -> None:
    ours = partial(AdEMAMix, **VALUES, warmup=10)
    assert gap(trajectory(ours, shapes=SHAPES), trajectory(ours, shapes=SHAPES, reuse=True)) == 0


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_in_less_precision_it_stays_near(dtype: torch.dtype, limit: float) -> None:
    ours = partial(AdEMAMix, **VALUES, warmup=10)
    assert gap(trajectory(ours, dtype=dtype, shapes=SHAPES), trajectory(ours, shapes=SHAPES)) < limit


def test_saved_and_loaded_it_goes_on_bit_by_bit() -> None:
    params = parameters(torch.float32, SHAPES)
    others = parameters(torch.float32, SHAPES)
    make: Callable = partial(AdEMAMix, betas=(0.9, 0.999, 0.99))
    optimizer = make([{"params": params, "role": "matrix"}], lr=0.05, warmup=10)
    for step in range(12):
        if step == 6:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = make([{"params": others, "role": "matrix"}], lr=0.5)
            other.load_state_dict(torch.load(file, weights_only=True))
            for p, q in zip(params, others, strict=True):
                q.data.copy_(p)
        for one, tensors in ((optimizer, params), (other, others)) if step >= 6 else ((optimizer, params),):
            for p, g in zip(tensors, gradients(tensors, step), strict=True):
                p.grad = g
            one.step()
    assert other.param_groups[0]["role"] == "matrix" and other.param_groups[0]["warmup"] == 10
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"AdEMAMix.lr: -1.0 \(expected 0 or more\)"),
        ({"betas": (0.9, 0.95)}, r"AdEMAMix.betas: \(0.9, 0.95\) \(expected 3 numbers"),
        ({"betas": (0.9, 0.999, 1.0)}, "AdEMAMix.betas"),
        ({"alpha": 0.0}, "AdEMAMix.alpha: 0.0 .expected more than 0; without its slow mean this is AdamW"),
        ({"warmup": 1}, "AdEMAMix.warmup: 1 .expected 2 steps or more, or None"),
        ({"eps": -1e-8}, "AdEMAMix.eps"),
        ({"weight_decay": -0.1}, "AdEMAMix.weight_decay"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdEMAMix([Parameter(torch.zeros(2, 2))], **values)
