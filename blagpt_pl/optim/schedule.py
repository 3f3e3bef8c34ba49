"""Learning-rate schedules: a factor in [0, 1] on the optimizer's own learning rate, for each step of the run.

Constant     1, after a linear warm-up if told to
Trapezoid    linear warm-up, constant, linear warm-down to 0: Zhai et al. 2021, arXiv:2106.04560; Hägele et al. 2024,
             arXiv:2405.18392. The step taken first (step 0) has factor 1 / warmup, the last 1 / warmdown.
Cosine       linear warm-up, then half a cosine down to `floor`: Loshchilov & Hutter 2016, arXiv:1608.03983
LinearDecay  linear warm-up, then a straight line down to `floor`: Bergsma et al. 2025, "Straight to Zero", arXiv:2502.15938
InverseSqrt  linear warm-up, then sqrt(warmup / step): Vaswani et al. 2017, arXiv:1706.03762, eq. (3), without its factor
             1 / sqrt(D warmup), so that the peak is 1; the warm-down multiplies it: Zhai et al. 2021, arXiv:2106.04560

Lengths are whole steps (`warmup: 250`) or a fraction of the run (`warmup: 0.05`), rounded to whole steps. What a schedule comes
down to is reached after the last step, not at it, so that no step is taken in vain.
"""

import math
from collections.abc import Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blagpt_pl.errors import ConfigError

Length = int | float  # an int is steps, a float is a fraction of the run


class Schedule:
    """A factor for each step; built when the length of the run is known."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def factor(self, step: int) -> float:
        """The factor of the update that is taken after `step` earlier ones."""
        raise NotImplementedError(f"{type(self).__name__} must return the factor of a step")

    def on(self, optimizer: Optimizer) -> LambdaLR:
        """The scheduler that applies this schedule to every group of an optimizer."""
        return LambdaLR(optimizer, self.factor)


# ---------------------------------------------------------------------- lengths, and the lines that several share


def in_steps(total_steps: int, lengths: Mapping[str, Length]) -> list[int]:
    """The lengths of phases that follow each other, by the names of their fields, in whole steps that fit in the run.

    Raises:
        ConfigError: a length that is neither steps nor a fraction, or all together are longer than the run.
    """
    for field, length in lengths.items():
        is_fraction = isinstance(length, float)
        if not 0 <= length <= (1 if is_fraction else math.inf):
            fix = f"; fix: {round(length)}" if is_fraction and 1 < length < math.inf else ""
            raise ConfigError(
                f"model.schedule.{field}: {length} (expected whole steps, 0 or more, or a fraction of the run from 0.0 to 1.0)"
                f"{fix}"
            )
    exact = [x * max(total_steps, 0) if isinstance(x, float) else x for x in lengths.values()]
    if sum(exact) > total_steps * (1 + 1e-9):  # 0.9 + 0.1 of a run are all of it, whatever the last bit says
        raise ConfigError(_too_long(total_steps, lengths))
    steps = [round(x) for x in exact]
    steps[-1] -= max(0, sum(steps) - total_steps)  # two halves of an odd run, both rounded up
    return steps


def _too_long(total_steps: int, lengths: Mapping[str, Length]) -> str:
    run = f"trainer.max_steps={total_steps}"
    fractions = all(isinstance(x, float) for x in lengths.values())
    most = "1.0" if fractions else f"{max(total_steps, 0)} steps, or name fractions of the run, such as 0.05"
    if len(lengths) == 1:
        ((field, length),) = lengths.items()
        return f"model.schedule.{field}: {length} does not fit in {run}; fix: at most {most}"
    named = " and ".join(f"{field}={length}" for field, length in lengths.items())
    return f"model.schedule: {named} do not fit in {run}; fix: make both sum to at most {most}"


def checked_floor(floor: float) -> float:
    """`floor`, if it is a factor.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= floor <= 1:
        raise ConfigError(f"model.schedule.floor: {floor} (expected a factor in [0, 1])")
    return floor


def up(step: int, warmup: int) -> float:
    """From 1 / warmup at the first step to 1 at the warm-up's last, and 1 from then on."""
    return min(1.0, (step + 1) / (warmup or 1))


def down(left: int, warmdown: int) -> float:
    """1 as long as `warmdown` steps or more are left, 1 / warmdown at the last step, 0 after it."""
    return min(1.0, max(0.0, left / (warmdown or 1)))


# ---------------------------------------------------------------------- the schedules


class Constant(Schedule):
    """The optimizer's own learning rate, after a linear warm-up if told to.

    Args:
        total_steps: length of the run.
        warmup: length of the warm-up, in steps or as a fraction of the run.
    """

    def __init__(self, total_steps: int, warmup: Length = 0) -> None:
        super().__init__(total_steps)
        self.warmup = in_steps(total_steps, {"warmup": warmup})[0] if warmup else 0  # without one, any run will do

    def factor(self, step: int) -> float:
        return up(step, self.warmup)


class Trapezoid(Schedule):
    """Linear warm-up, constant, linear warm-down to 0.

    Args:
        total_steps: length of the run.
        warmup: length of the warm-up, in steps or as a fraction of the run.
        warmdown: length of the warm-down, likewise.
    """

    def __init__(self, total_steps: int, warmup: Length, warmdown: Length) -> None:
        super().__init__(total_steps)
        self.warmup, self.warmdown = in_steps(total_steps, {"warmup": warmup, "warmdown": warmdown})

    def factor(self, step: int) -> float:
        return min(up(step, self.warmup), down(self.total_steps - step, self.warmdown))


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `floor`.

    Args:
        total_steps: length of the run.
        warmup: length of the warm-up, in steps or as a fraction of the run.
        floor: the factor at the end.
    """

    def __init__(self, total_steps: int, warmup: Length, floor: float = 0.0) -> None:
        super().__init__(total_steps)
        (self.warmup,) = in_steps(total_steps, {"warmup": warmup})
        self.floor = checked_floor(floor)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return up(step, self.warmup)
        done = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class LinearDecay(Schedule):
    """Linear warm-up, then a straight line down to `floor`.

    Args:
        total_steps: length of the run.
        warmup: length of the warm-up, in steps or as a fraction of the run.
        floor: the factor at the end.
    """

    def __init__(self, total_steps: int, warmup: Length, floor: float = 0.0) -> None:
        super().__init__(total_steps)
        (self.warmup,) = in_steps(total_steps, {"warmup": warmup})
        self.floor = checked_floor(floor)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return up(step, self.warmup)
        return self.floor + (1 - self.floor) * down(self.total_steps - step, self.total_steps - self.warmup)


class InverseSqrt(Schedule):
    """Linear warm-up, then down as 1 / sqrt(step), linearly to 0 at the end if told to.

    Args:
        total_steps: length of the run.
        warmup: length of the warm-up, 1 step or more, in steps or as a fraction of the run; the decay is measured in it.
        warmdown: length of the warm-down, likewise, or 0 for none.
    """

    def __init__(self, total_steps: int, warmup: Length, warmdown: Length = 0) -> None:
        super().__init__(total_steps)
        self.warmup, self.warmdown = in_steps(total_steps, {"warmup": warmup, "warmdown": warmdown})
        if self.warmup < 1:
            found = f"{warmup} of {total_steps} steps is no step" if warmup else warmup
            raise ConfigError(
                f"model.schedule.warmup: {found} (InverseSqrt measures its decay in warm-ups); fix: 1 step or more"
            )

    def factor(self, step: int) -> float:
        decay = min(up(step, self.warmup), math.sqrt(self.warmup / (step + 1)))
        return decay * down(self.total_steps - step, self.warmdown)
