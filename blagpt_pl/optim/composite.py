"""Composite: one optimizer made of two, the matrices to the first, all other parameters to the second.

Lightning, schedules and checkpoints see one `Optimizer`. Its parameter groups are the members' own dictionaries, its state is
theirs by parameter, and its checkpoint has torch's usual layout, whichever member a group belongs to.
"""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch.optim import Optimizer

from blagpt_pl.optim.base import GroupOptimizer

OptimizerFactory = Callable[[Iterable], Optimizer]


class States(MutableMapping):
    """The state of several optimizers as one mapping: what belongs to a parameter stands with the one that has it."""

    def __init__(self, members: Iterable[Optimizer]) -> None:
        self._members = list(members)

    def _holder(self, key: Any) -> MutableMapping:
        for member in self._members:
            if key in member.state or any(key is p for group in member.param_groups for p in group["params"]):
                return member.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._holder(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._holder(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._holder(key)[key]

    def __iter__(self) -> Iterator:
        return (key for member in self._members for key in member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)


class Composite(Optimizer):
    """Matrices to one optimizer, all other parameters to another; each has its own learning rate.

    Args:
        groups: parameter groups with a `role` each.
        matrix: builds the optimizer of the groups whose role is `matrix`.
        other: builds the optimizer of all other groups.

    Raises:
        ValueError: a group has no role, or one of the two would be without parameters.
    """

    def __init__(self, groups: Iterable, matrix: OptimizerFactory, other: OptimizerFactory) -> None:
        groups = list(groups)
        names = [self._member_of(group) for group in groups]
        self.members: dict[str, Optimizer] = {}
        for name, factory in (("matrix", matrix), ("other", other)):
            given = [group for group, owner in zip(groups, names, strict=True) if owner == name]
            if not given:
                roles = ", ".join(dict.fromkeys(group["role"] for group in groups)) or "none"
                raise ValueError(f"Composite.{name}: matches no parameter (the roles of this model: {roles})")
            member = factory(given)
            if len(member.param_groups) != len(given):
                raise ValueError(
                    f"Composite.{name}: {type(member).__name__} makes {len(member.param_groups)} groups of {len(given)} "
                    "(expected an optimizer that keeps them as they are)"
                )
            if getattr(member, "local_gradients", False):
                raise ValueError(
                    f"Composite.{name}: {type(member).__name__} wants each rank's own gradients, and its neighbour those of "
                    f"all ranks (expected two that want the same); fix: class_path: {type(member).__name__} for all parameters"
                )
            self.members[name] = member
        self._names: list[str] = []  # of the member that has each group
        super().__init__([group for group, _ in self._own(names)], {})
        self.state = States(self.members.values())

    @staticmethod
    def _member_of(group: Any) -> str:
        if not isinstance(group, dict) or "role" not in group:
            raise ValueError(
                "Composite: found parameters without a role (expected the groups of a model, optim/roles.py)"
            )
        return "matrix" if group["role"] == "matrix" else "other"

    def _own(self, names: list[str]) -> Iterator[tuple[dict, str]]:
        """The members' groups in the order of these names."""
        groups = {name: iter(member.param_groups) for name, member in self.members.items()}
        return ((next(groups[name]), name) for name in names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Hand a group to the member that its role says."""
        name = self._member_of(param_group)
        member = self.members[name]
        if not any(param_group is known for known in member.param_groups):
            member.add_param_group(param_group)
            param_group = member.param_groups[-1]
        self._names.append(name)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of both, after the closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members.values():
            member.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both members' states, the parameters numbered through all groups as torch does."""
        numbers, state, groups = {}, {}, []
        saved = {name: member.state_dict() for name, member in self.members.items()}
        rest = {name: iter(one["param_groups"]) for name, one in saved.items()}
        for name in self._names:
            group = next(rest[name])
            ours = range(len(numbers), len(numbers) + len(group["params"]))
            numbers |= {(name, number): our for number, our in zip(group["params"], ours, strict=True)}
            groups.append({**group, "params": list(ours)})
        for name, one in saved.items():
            state |= {numbers.get((name, key), f"{name}.{key}"): value for key, value in one["state"].items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; its parameters may be numbered or named in any way, as long as the groups agree.

        Raises:
            ValueError: the groups do not.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        parameters = {key for group in groups for key in group["params"]}
        if len(groups) != len(self._names):
            raise ValueError(
                f"Composite: the saved state has {len(groups)} parameter groups (expected {len(self._names)})"
            )
        for name, member in self.members.items():
            given = [group for group, owner in zip(groups, self._names, strict=True) if owner == name]
            keys = {key for group in given for key in group["params"]}
            own = {key: value for key, value in state.items() if key in keys}
            prefix = f"{name}."
            shared = {key[len(prefix) :]: state[key] for key in state.keys() - parameters if key.startswith(prefix)}
            member.load_state_dict({"state": own | shared, "param_groups": given})
        self.param_groups = [group for group, _ in self._own(self._names)]

    __getstate__ = GroupOptimizer.__getstate__
