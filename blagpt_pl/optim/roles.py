"""What each tensor is, told to the optimizer as plain parameter groups with one extra key, `role`.

Roles: `embedding` (a table looked up by token or position), `head` (a map onto the vocabulary of its own), `matrix` (any
other tensor of two or more dimensions), `vector` (gains, biases, scalars), `recurrence` (what sets how a recurrence forgets and
what it takes in, of any dimensions: A_log, dt_bias, D, kernels of short convolutions, low-rank maps to decay and gates), and
`timescale` (biases of the decay that learn faster than the rest: their learning rate is `LR_SCALE` times the optimizer's).
Weight decay acts on matrices unless a group says otherwise. Matrices that stack several maps, such as q, k and v, say so under the key `splits`; every group says under
`blocks` which rows of its parameters act as one: the rows of a head, a whole gain.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

ROLES = ("matrix", "embedding", "head", "vector", "recurrence", "timescale")
OWN = ("recurrence", "timescale")  # said by the module that has them, whatever their shape
LR_SCALE = {"timescale": 2.0}  # Peng et al. 2025, "RWKV-7", arXiv:2503.14456, its training code
Blocks = tuple[tuple[int, int], ...]  # runs along dimension 0: rows, and how many of them are one block


def rows_apart(p: Tensor) -> Blocks:
    """Every row of a tensor a block of its own: every number of a vector, every slice along dimension 0 of more."""
    return ((p.shape[0] if p.ndim else 1, 1),)


def groups_by_role(
    named: Iterable[tuple[str, Parameter]],
    roles: Mapping[str, str],
    splits: Mapping[str, Sequence[int]] | None = None,
    blocks: Mapping[str, Blocks] | None = None,
) -> list[dict]:
    """One parameter group for each role present, in the order of `ROLES`.

    Args:
        named: every distinct parameter with its name.
        roles: the role of each name.
        splits: of matrices that stack several maps, the rows of each map.
        blocks: of parameters whose rows do not all act alone, the runs of their rows.

    Returns:
        torch parameter groups with `params`, `role` and, on all but matrices, `weight_decay: 0`. Beside matrices, `splits`:
        for each one in the order of `params`, the rows of its maps, which are all of its rows where it is one map. In
        every group `blocks`: for each parameter its runs (rows, rows of one block), one run of single rows by default.

    Raises:
        ValueError: a trainable parameter without a role, a role or blocks without a parameter, or an unknown role.
    """
    named = dict(named)
    trainable = {name: p for name, p in named.items() if p.requires_grad}
    if missing := sorted(trainable.keys() - roles.keys()):
        raise ValueError(
            f"parameter_roles: no role for {missing[0]} (and {len(missing) - 1} more); every trainable tensor needs one"
        )
    if idle := sorted(roles.keys() - named.keys()):
        raise ValueError(
            f"parameter_roles: {idle[0]} (and {len(idle) - 1} more) is no parameter; a role must match one"
        )
    if idle := sorted((blocks or {}).keys() - named.keys()):
        raise ValueError(f"blocks: {idle[0]} (and {len(idle) - 1} more) is no parameter; blocks must belong to one")
    if unknown := sorted(set(roles.values()) - set(ROLES)):
        raise ValueError(f"parameter_roles: unknown role {unknown[0]!r} (expected one of {', '.join(ROLES)})")
    groups = []
    for role in ROLES:
        members = {name: p for name, p in trainable.items() if roles[name] == role}
        rows = [tuple((splits or {}).get(name, p.shape[:1])) for name, p in members.items()]
        if members:
            own = {"splits": rows} if role == "matrix" else {"weight_decay": 0.0}
            own["blocks"] = [(blocks or {}).get(name, rows_apart(p)) for name, p in members.items()]
            groups.append({"params": list(members.values()), "role": role, **own})
    return groups


def maps_of(name: str, group: Mapping[str, Any], dimensions: int | None = None) -> dict[Tensor, tuple[int, ...]]:
    """Of each matrix of a group: the rows of the maps that it stacks, which are all of its rows where the group says no `splits`.

    Args:
        name: the optimizer that takes matrices only.
        group: a parameter group.
        dimensions: that a matrix must have; two or more if None.

    Raises:
        ValueError: the group is of another role, or has a tensor that is no matrix, or splits that are not all rows.
    """
    role = group.get("role", "matrix")
    if role != "matrix":
        raise ValueError(
            f"{name}: takes matrices only, found parameters of role {role}; fix: class_path: Composite with matrix: {name} "
            "and an optimizer for the other parameters"
        )
    params = group["params"]
    for p in params:
        if p.ndim < 2 or dimensions not in (None, p.ndim):
            raise ValueError(f"{name}: takes matrices only, found a tensor {tuple(p.shape)}")
    splits = [tuple(rows) for rows in group.get("splits", [p.shape[:1] for p in params])]
    for p, rows in zip(params, splits, strict=True):
        if sum(rows) != p.shape[0]:
            raise ValueError(f"{name}: splits {rows} of a matrix of {p.shape[0]} rows (expected as many in all)")
    return dict(zip(params, splits, strict=True))


def scale_learning_rates(optimizer: Optimizer) -> None:
    """Give the groups of the roles in `LR_SCALE` their share of the learning rate that they were built with."""
    for group in optimizer.param_groups:
        scale = LR_SCALE.get(group.get("role"), 1.0)
        if scale != 1.0:
            group["lr"] = group["lr"] * scale
