"""What an optimizer was told and what it keeps, for the record of a run: the values of every group, the bytes of its state."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from blagpt_pl.optim.placed import here

LONG = ("params", "splits", "blocks")  # of a group: what is told parameter by parameter


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Every tensor that this rank keeps beside the weights, sharded ones as far as they lie here."""
    for leaf in tree_leaves(list(optimizer.state.values())):
        if isinstance(leaf, Tensor):
            yield here(leaf)


def state_bytes(*optimizers: Optimizer) -> int:
    """Bytes of those tensors, each counted once."""
    distinct = {id(t): t for optimizer in optimizers for t in state_tensors(optimizer)}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def groups_told(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Each group by its role, how many tensors and numbers it has, and all values that hold for it; `lr` is the peak."""
    told = []
    for group in optimizer.param_groups:
        values = {
            k: _plain(v) for k, v in group.items() if k not in (*LONG, "role", "lr", "initial_lr") and k[0] != "_"
        }
        told.append(
            {
                "role": group.get("role", "all"),
                "tensors": len(group["params"]),
                "parameters": sum(p.numel() for p in group["params"]),
                "lr": _plain(group.get("initial_lr", group["lr"])),
                **{k: v for k, v in values.items() if v is not None},
            }
        )
    return told


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else list(value.shape)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)
