"""What the house's own optimizers share: a step over groups, counters and zeros as state, values that are in range.

State lies beside its parameter (sharded where it is), and counts are tensors without dimensions on the host, as torch's
own optimizers have them: so every checkpoint, sharded or not, holds plain tensors, and reading a count waits for no device.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.optim.placed import here

Check = tuple[Any, bool, str]  # a value, whether it fits, what was expected


class GroupOptimizer(Optimizer):
    """An optimizer whose update is said for one group at a time.

    Args:
        params: tensors, or groups of them; what a group says itself overrides a default.
        defaults: of every group, each by the name that a configuration has for it.
    """

    def __init__(self, params: Iterable, defaults: dict[str, Any]) -> None:
        self._counts: dict[Tensor, int] = {}  # as in the state, known without a look at a tensor
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group.

        Raises:
            ValueError: a value of it is out of its range.
        """
        super().add_param_group(param_group)
        for name, (value, fits, expected) in self.ranges(self.param_groups[-1]).items():
            if not fits:
                self.param_groups.pop()
                raise ValueError(f"{type(self).__name__}.{name}: {value} (expected {expected})")

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        """For each value of a group by name: the value, whether it fits, and what was expected."""
        raise NotImplementedError(f"{type(self).__name__} must say which values it takes")

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Take one step with the parameters of a group that have a gradient."""
        raise NotImplementedError(f"{type(self).__name__} must say how it takes a step")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self.update(params, group)
        return loss

    # ------------------------------------------------------------------ state

    def count(self, params: list[Tensor]) -> list[int]:
        """Add one to each parameter's count of steps; returns the counts, of which the first is 1."""
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"], self._counts[p] = torch.zeros((), dtype=torch.float32, device="cpu"), 0
            elif p not in self._counts:
                self._counts[p] = int(state["step"])
            state["step"] += 1
            self._counts[p] += 1
        return [self._counts[p] for p in params]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._counts.clear()

    def zeros(self, params: list[Tensor], name: str) -> list[Tensor]:
        """This rank's part of each parameter's buffer of that name, zero before the first step; written in place."""
        buffers = []
        for p in params:
            state = self.state[p]
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            buffers.append(here(state[name]))
        return buffers

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


def decay_(weights: list[Tensor], amount: float) -> None:
    """W <- (1 - amount) W, in place; nothing where the amount is 0."""
    if amount:
        torch._foreach_mul_(weights, 1 - amount)


def betas_fit(betas: Any, n: int = 2) -> Check:
    """The check of n decay rates of running means."""
    fits = isinstance(betas, list | tuple) and len(betas) == n and all(0 <= beta < 1 for beta in betas)
    return betas, fits, f"{n} numbers in [0, 1)"


def not_negative(value: float) -> Check:
    """The check of a rate, a decay, an epsilon."""
    return value, value >= 0, "0 or more"
