"""Learning-rate schedules: a factor in [0, 1] on the optimizer's own learning rate, for each step of the run.

Trapezoid  linear warm-up, constant, linear warm-down to 0: Zhai et al. 2021, arXiv:2106.04560; Hägele et al. 2024,
           arXiv:2405.18392. The step taken first (step 0) has factor 1 / warmup, the last 1 / warmdown.
Cosine     linear warm-up, then half a cosine down to `floor`: Loshchilov & Hutter 2016, arXiv:1608.03983
Constant   1
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blagpt_pl.errors import ConfigError


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


class Constant(Schedule):
    """The optimizer's own learning rate throughout.

    Args:
        total_steps: length of the run.
    """

    def factor(self, step: int) -> float:
        return 1.0


class Trapezoid(Schedule):
    """Linear warm-up, constant, linear warm-down to 0.

    Args:
        total_steps: length of the run.
        warmup: steps of the warm-up.
        warmdown: steps of the warm-down.
    """

    def __init__(self, total_steps: int, warmup: int, warmdown: int) -> None:
        super().__init__(total_steps)
        if warmup < 0 or warmdown < 0 or warmup + warmdown > total_steps:
            raise ConfigError(
                f"model.schedule: warmup={warmup} and warmdown={warmdown} do not fit in trainer.max_steps={total_steps}; "
                f"fix: make both sum to at most {total_steps}"
            )
        self.warmup, self.warmdown = warmup, warmdown

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if step >= self.total_steps - self.warmdown:
            return max(0.0, (self.total_steps - step) / (self.warmdown or 1))
        return 1.0


class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `floor`.

    Args:
        total_steps: length of the run.
        warmup: steps of the warm-up.
        floor: the factor at the end.
    """

    def __init__(self, total_steps: int, warmup: int, floor: float = 0.0) -> None:
        super().__init__(total_steps)
        if warmup < 0 or warmup > total_steps:
            raise ConfigError(f"model.schedule: warmup={warmup} does not fit in trainer.max_steps={total_steps}")
        if not 0 <= floor <= 1:
            raise ConfigError(f"model.schedule: floor={floor} (expected a factor in [0, 1])")
        self.warmup, self.floor = warmup, floor

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total_steps - self.warmup))
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))
