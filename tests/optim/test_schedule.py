"""Schedules: the factor of every step, and that an optimizer receives it."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.optim.schedule import Constant, Cosine, Schedule, Trapezoid


def test_trapezoid_step_by_step() -> None:
    schedule = Trapezoid(10, warmup=4, warmdown=3)
    factors = [schedule.factor(step) for step in range(10)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 3 / 3, 2 / 3, 1 / 3])
    assert schedule.factor(10) == schedule.factor(99) == 0


def test_trapezoid_of_the_baseline() -> None:
    """250 up and 2000 down, as in modded-nanogpt: min((step + 1) / 250, 1, (total - step) / 2000)."""
    total = 5100
    schedule = Trapezoid(total, warmup=250, warmdown=2000)
    for step in range(total):
        assert schedule.factor(step) == pytest.approx(min((step + 1) / 250, 1.0, (total - step) / 2000))


@pytest.mark.parametrize(("warmup", "warmdown"), [(0, 0), (10, 0), (0, 10), (5, 5)])
def test_trapezoid_at_its_limits(warmup: int, warmdown: int) -> None:
    factors = [Trapezoid(10, warmup, warmdown).factor(step) for step in range(10)]
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == 1


def test_cosine_step_by_step() -> None:
    schedule = Cosine(12, warmup=2, floor=0.1)
    expected = [0.5, 1.0] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert [schedule.factor(step) for step in range(12)] == pytest.approx(expected)
    assert schedule.factor(12) == schedule.factor(99) == pytest.approx(0.1)


def test_cosine_that_only_warms_up() -> None:
    assert [Cosine(4, warmup=4).factor(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_constant() -> None:
    assert {Constant(7).factor(step) for step in range(20)} == {1.0}


@settings(deadline=None)
@given(st.data())
def test_factors_stay_in_bounds_rise_then_fall(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 300))
    warmup = data.draw(st.integers(0, total))
    schedule = data.draw(
        st.sampled_from(
            [Trapezoid(total, warmup, data.draw(st.integers(0, total - warmup))), Cosine(total, warmup, 0.2)]
        )
    )
    factors = [schedule.factor(step) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    rises = [b > a for a, b in itertools.pairwise(factors)]
    falls = [b < a for a, b in itertools.pairwise(factors)]
    assert all(rises[: max(warmup - 1, 0)])
    assert not any(rises[max(warmup, 1) :])
    assert not any(falls[: max(warmup - 1, 0)])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Trapezoid, 10, 6, 5), "warmup=6 and warmdown=5 do not fit in trainer.max_steps=10; fix: "),
        (partial(Trapezoid, 10, -1, 5), "warmup=-1"),
        (partial(Trapezoid, 10, 1, -5), "warmdown=-5"),
        (partial(Trapezoid, -1, 0, 0), "trainer.max_steps=-1"),
        (partial(Cosine, 10, 11), "warmup=11 does not fit in trainer.max_steps=10"),
        (partial(Cosine, 10, -1), "warmup=-1"),
        (partial(Cosine, 10, 1, 1.5), "floor=1.5"),
        (partial(Cosine, 10, 1, -0.1), "floor=-0.1"),
    ],
)
def test_a_mistake_is_told(build: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_schedule_must_say_its_factor() -> None:
    with pytest.raises(NotImplementedError, match="Schedule"):
        Schedule(10).factor(0)


def test_every_group_follows_from_its_own_rate() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameters[0]], "lr": 0.5}, {"params": [parameters[1]], "lr": 2.0}])
    schedule = Trapezoid(6, warmup=2, warmdown=2)
    scheduler = schedule.on(optimizer)
    for step in range(6):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.5 * schedule.factor(step), 2.0 * schedule.factor(step)]
        )
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]


def test_a_schedule_resumes_where_it_stood() -> None:
    def rates(resume_at: int | None) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = Cosine(9, warmup=3).on(optimizer)
        seen = []
        for step in range(9):
            if step == resume_at:
                states = optimizer.state_dict(), scheduler.state_dict()
                optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
                scheduler = Cosine(9, warmup=3).on(optimizer)
                optimizer.load_state_dict(states[0])
                scheduler.load_state_dict(states[1])
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(None) == rates(2) == rates(6)
