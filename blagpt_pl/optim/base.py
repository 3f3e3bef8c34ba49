"""What the house's own optimizers share: a step over groups, counters and zeros as state, values that are in range.

State lies beside its parameter (sharded where it is), and counts are tensors without dimensions on the host, as torch's
own optimizers have them: so every checkpoint, sharded or not, holds plain tensors, and reading a count waits for no device.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.errors import CheckpointError
from blagpt_pl.optim.placed import here

Check = tuple[Any, bool, str]  # a value, whether it fits, what was expected
NOT_ITS_OWN = {  # of a group: what a model says, and what schedulers write
    "params", "param_names", "role", "splits", "blocks", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum",
}  # fmt: skip


class GroupOptimizer(Optimizer):
    """An optimizer whose update is said for one group at a time.

    Args:
        params: tensors, or groups of them; what a group says itself overrides a default.
        defaults: of every group, each by the name that a configuration has for it.

    Attributes:
        precise: how the names of buffers begin that are float32 at least beside any weights, also after loading: where a mean
            is so slow that bfloat16 would round its decay away, or more than a mean is made of it.
    """

    precise: tuple[str, ...] = ()

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
        """Take up a state of the same optimizer over the same groups.

        Raises:
            CheckpointError: its groups have other values, or another role; torch would let them replace those of this one.
        """
        for i, (own, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if odd := sorted((own.keys() ^ saved.keys()) - NOT_ITS_OWN):
                has = "has" if odd[0] in saved else "lacks"
                raise CheckpointError(
                    f"{type(self).__name__}: the saved state is another optimizer's, its group {i} {has} {odd[0]} (expected "
                    f"{', '.join(sorted(own.keys() - NOT_ITS_OWN))}); fix: the optimizer that saved it, or a new run"
                )
            if own.get("role", saved.get("role")) != saved.get("role", own.get("role")):
                raise CheckpointError(
                    f"{type(self).__name__}: group {i} of the saved state has role {saved.get('role')} (expected "
                    f"role {own.get('role')})"
                )
        super().load_state_dict(state_dict)
        self._counts.clear()
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        for key, p in zip(keys, (p for group in self.param_groups for p in group["params"]), strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name.startswith(self.precise):  # torch has given it the precision of the weights
                    self.state[p][name] = value.to(p.device, wide(p.dtype), copy=True)

    def zeros(self, params: list[Tensor], name: str) -> list[Tensor]:
        """This rank's part of each parameter's buffer of that name, zero before the first step; written in place."""
        buffers = []
        for p in params:
            state = self.state[p]
            if name not in state:
                dtype = wide(p.dtype) if name.startswith(self.precise) else p.dtype
                state[name] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
            buffers.append(here(state[name]))
        return buffers

    @staticmethod
    def precise_gradients(params: list[Tensor]) -> list[Tensor]:
        """This rank's part of each gradient, in float32 at least; not to be written to."""
        grads = [here(p.grad) for p in params]
        return [g if g.dtype in (torch.float32, torch.float64) else g.float() for g in grads]

    def __getstate__(self) -> dict[str, Any]:
        """All but a `step` that a scheduler has wrapped: it is bound to this one, and a copy would move this one's weights."""
        return {name: value for name, value in self.__dict__.items() if name != "step"}


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


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
