"""Schedules: the factor of every step, and that an optimizer receives it."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.optim.schedule import Constant, Cosine, InverseSqrt, LinearDecay, Schedule, Trapezoid


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


def test_constant_after_a_warmup() -> None:
    assert [Constant(6, warmup=3).factor(step) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_linear_step_by_step() -> None:
    factors = [LinearDecay(7, warmup=2, floor=0.5).factor(step) for step in range(9)]
    assert factors == pytest.approx([0.5, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5])


def test_inverse_sqrt_of_the_paper() -> None:
    """Equation (3) of Vaswani et al. 2017, D^-0.5 min(n^-0.5, n w^-1.5), over its largest value."""
    warmup, width = 40, 512
    schedule = InverseSqrt(500, warmup)
    rates = [width**-0.5 * min(n**-0.5, n * warmup**-1.5) for n in range(1, 501)]
    assert [schedule.factor(step) for step in range(500)] == pytest.approx(
        [rate / max(rates) for rate in rates], rel=1e-12
    )
    assert schedule.factor(39) == 1 and schedule.factor(159) == pytest.approx(1 / 2)


def test_inverse_sqrt_with_a_warmdown_is_multiplied_by_it() -> None:
    plain, cooled = InverseSqrt(100, 10), InverseSqrt(100, 10, warmdown=20)
    for step in range(100):
        assert cooled.factor(step) == pytest.approx(plain.factor(step) * min(1, (100 - step) / 20))
    assert cooled.factor(100) == 0


# ---------------------------------------------------------------------- equal to torch's, which start from the peak


def stepped(total: int, make: partial) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    seen = []
    for _ in range(total):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


LR = torch.optim.lr_scheduler


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.floats(0, 1))
def test_equal_to_torch(total: int, floor: float) -> None:
    cosine, line = Cosine(total, 0, floor), LinearDecay(total, 0, floor)
    theirs = stepped(total, partial(LR.CosineAnnealingLR, T_max=total, eta_min=floor))
    assert stepped(total, cosine.on) == pytest.approx(theirs, abs=1e-12)
    theirs = stepped(total, partial(LR.LinearLR, start_factor=1.0, end_factor=floor, total_iters=total))
    assert stepped(total, line.on) == pytest.approx(theirs, abs=1e-12)
    assert stepped(total, line.on) == [line.factor(step) for step in range(total)]


# ---------------------------------------------------------------------- whatever the lengths


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any schedule, its lengths in steps or as fractions, with whatever fits."""
    total = draw(st.integers(1, 300))
    as_fractions = draw(st.booleans())
    warmup = draw(st.floats(0, 1) if as_fractions else st.integers(0, total))
    rest = draw(st.floats(0, 1 - warmup) if as_fractions else st.integers(0, total - warmup))
    kind = draw(st.sampled_from([Constant, Trapezoid, Cosine, LinearDecay, InverseSqrt]))
    if kind is Constant:
        return Constant(total, warmup)
    if kind in (Cosine, LinearDecay):
        return kind(total, warmup, draw(st.floats(0, 1)))
    if kind is InverseSqrt and round(warmup * total if as_fractions else warmup) < 1:
        return InverseSqrt(total, 1)
    return kind(total, warmup, rest)


@settings(deadline=None, max_examples=200)
@given(schedules())
def test_factors_rise_to_the_peak_then_fall_without_a_jump(schedule: Schedule) -> None:
    total, warmup = schedule.total_steps, schedule.warmup
    warmdown, floor = getattr(schedule, "warmdown", 0), getattr(schedule, "floor", 0)
    assert 0 <= warmup and 0 <= warmdown and warmup + warmdown <= total
    factors = [schedule.factor(step) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == pytest.approx(1) and factors[max(warmup, 1) - 1] == pytest.approx(1)
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    falling = factors[max(warmup, 1) - 1 :]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))
    assert all(f >= floor - 1e-12 for f in falling)
    left = max(1, total - warmup)
    slope = {
        Constant: 0, Trapezoid: 1 / max(warmdown, 1), LinearDecay: (1 - floor) / left,
        Cosine: (1 - floor) * math.pi / 2 / left, InverseSqrt: (warmdown and 1 / warmdown) + 1 / (2 * max(warmup, 1)),
    }[type(schedule)]  # fmt: skip
    assert all(a - b <= slope + 1e-12 for a, b in itertools.pairwise(falling))
    last = {
        Trapezoid: 1 / max(warmdown, 1),
        LinearDecay: floor + (1 - floor) / left,
        InverseSqrt: math.sqrt(warmup / total) / max(warmdown, 1),
    }
    if type(schedule) in last and warmup < total:
        assert factors[-1] == pytest.approx(last[type(schedule)])


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_a_fraction_is_so_many_steps(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(1, total))
    warmdown = data.draw(st.integers(0, total - warmup))
    for kind in (Trapezoid, InverseSqrt):
        by_steps, by_fraction = kind(total, warmup, warmdown), kind(total, warmup / total, warmdown / total)
        assert vars(by_steps) == vars(by_fraction)
    for kind in (Constant, Cosine, LinearDecay):
        assert kind(total, warmup).warmup == kind(total, warmup / total).warmup == warmup


def test_an_int_is_steps_and_a_float_a_fraction() -> None:
    assert [Cosine(100, w).warmup for w in (0, 0.0, 1, 1.0, 0.29, 0.004, 0.006)] == [0, 0, 1, 100, 29, 0, 1]
    halves = Trapezoid(3, 0.5, 0.5)
    assert halves.warmup + halves.warmdown == 3, "two halves that are both rounded up"
    mixed = Trapezoid(5100, 250, 0.4)
    assert (mixed.warmup, mixed.warmdown) == (250, 2040)


def test_straight_to_zero_is_a_trapezoid_without_a_top() -> None:
    line, trapezoid = LinearDecay(50, 10), Trapezoid(50, 10, 40)
    assert [line.factor(s) for s in range(60)] == pytest.approx([trapezoid.factor(s) for s in range(60)])


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Trapezoid, 10, 6, 5), "warmup=6 and warmdown=5 do not fit in trainer.max_steps=10; fix: "),
        (
            partial(Trapezoid, 10, -1, 5),
            r"model\.schedule\.warmup: -1 \(expected whole steps, 0 or more, or a fraction",
        ),
        (partial(Trapezoid, 10, 1, -5), r"model\.schedule\.warmdown: -5 "),
        (partial(Trapezoid, -1, 0, 0), "trainer.max_steps=-1"),
        (
            partial(Trapezoid, 10, 0.6, 0.5),
            "warmup=0.6 and warmdown=0.5 do not fit .*; fix: make both sum to at most 1.0$",
        ),
        (
            partial(Trapezoid, 10, 6, 0.5),
            "warmup=6 and warmdown=0.5 do not fit .*; fix: make both sum to at most 10 steps",
        ),
        (partial(InverseSqrt, 10, 6, 5), "warmup=6 and warmdown=5 do not fit"),
        (
            partial(Cosine, 10, 11),
            r"model\.schedule\.warmup: 11 does not fit in trainer\.max_steps=10; fix: at most 10 steps",
        ),
        (partial(LinearDecay, 10, 11), r"model\.schedule\.warmup: 11 does not fit"),
        (partial(Constant, 10, 11), r"model\.schedule\.warmup: 11 does not fit"),
        (partial(Cosine, 10, 250.0), r"model\.schedule\.warmup: 250\.0 \(expected .*; fix: 250$"),
        (partial(Cosine, 10, -0.1), r"model\.schedule\.warmup: -0\.1 \(expected .* to 1\.0\)$"),
        (partial(Cosine, 10, math.nan), r"model\.schedule\.warmup: nan \("),
        (partial(Cosine, 10, math.inf), r"model\.schedule\.warmup: inf \("),
        (partial(Cosine, 10, 1, 1.5), r"model\.schedule\.floor: 1\.5 \(expected a factor in \[0, 1\]"),
        (partial(LinearDecay, 10, 1, -0.1), r"model\.schedule\.floor: -0\.1"),
        (partial(InverseSqrt, 10, 0), r"model\.schedule\.warmup: 0 \(InverseSqrt .*; fix: 1 step or more"),
        (partial(InverseSqrt, 10, 0.01), r"model\.schedule\.warmup: 0\.01 of 10 steps is no step"),
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


def test_two_halves_of_an_odd_run_keep_the_warmup() -> None:
    schedule = Trapezoid(7, 0.5, 0.5)
    assert (schedule.warmup, schedule.warmdown) == (4, 3)
