"""Muon: the momentum of each matrix is orthogonalised, so that a step is as large in every direction that it takes.

Source   Jordan et al. 2024, kellerjordan.github.io/posts/muon; weight decay and the scale `rms`: Liu et al. 2025
         ("Moonlight"), arXiv:2502.16982, section 2.2
Formula  M <- μ M + (1 - μ) G,  U = (1 - μ) G + μ M (Nesterov) or M,  O = newton_schulz(U)
         W <- (1 - η λ) W - η s O,  s = sqrt(max(1, rows / columns)) (`shape`) or 0.2 sqrt(max(rows, columns)) (`rms`)
Differs  the momentum is a mean, not a sum: orthogonalisation does not see the factor 1 / (1 - μ) between the two. A matrix
         that stacks several maps (a group's `splits`) is orthogonalised map by map, as Jordan et al. do with q, k and v.
         Equal shapes are one batch, and ranks share them (`optim.orthogonal`).
Cost     one number a parameter of state; `newton_schulz` of every matrix once a step, over all ranks together
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from blagpt_pl.optim.base import Check, GroupOptimizer, not_negative, wide
from blagpt_pl.optim.orthogonal import orthogonal, orthogonalise_
from blagpt_pl.optim.placed import here, mine, ranks_of, whole
from blagpt_pl.optim.roles import maps_of

SCALES: dict[str, Callable[[int, int], float]] = {
    "shape": lambda rows, columns: sqrt(max(1, rows / columns)),
    "rms": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


def directions(grads: list[Tensor], momenta: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
    """Take the gradients into the momenta, in place; returns new tensors, the directions of descent."""
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    return list(torch._foreach_lerp(grads, momenta, momentum)) if nesterov else [m.clone() for m in momenta]


def descend(weights: list[Tensor], updates: list[Tensor], rate: float | Tensor, keep: float | Tensor | None) -> None:
    """W <- keep · W - rate · update, in place."""
    if keep is not None:
        torch._foreach_mul_(weights, keep)
    torch._foreach_sub_(weights, torch._foreach_mul(updates, rate))


class Muon(GroupOptimizer):
    """Momentum, orthogonalised. For matrices alone: embeddings, heads and vectors belong to another (`Composite`).

    Args:
        params: parameter groups of role `matrix`, or matrices.
        lr: η; near 0.02 with the scale `shape`, near AdamW's with `rms`.
        momentum: μ.
        nesterov: whether the direction looks one step ahead.
        weight_decay: λ, decoupled: a step takes η λ of each weight.
        scale: how an update's size follows from the shape of its matrix.
        steps: iterations of `newton_schulz`.
        compile: backend of torch.compile for the sums and the iterations, or None to run eagerly.

    Raises:
        ValueError: a value out of its range, or a tensor that is no matrix of the network's inside.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        scale: Literal["shape", "rms"] = "shape",
        steps: int = 5,
        compile: str | None = None,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"Muon.scale: {scale} (expected {' or '.join(SCALES)})")
        if steps < 1:
            raise ValueError(f"Muon.steps: {steps} (expected 1 or more)")
        if nesterov and momentum == 0:
            raise ValueError("Muon.nesterov: has no effect without momentum; fix: nesterov: false, or momentum: 0.95")
        self.nesterov, self.scale, self.steps = nesterov, SCALES[scale], steps
        self.compiled = compile is not None
        self._directions, self._orthogonal, self._descend = (
            torch.compile(f, backend=compile, fullgraph=True, dynamic=False) if self.compiled else f
            for f in (directions, orthogonal, descend)
        )
        self._splits: dict[Tensor, tuple[int, ...]] = {}
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in matrices; their `splits`, if the group has some, say how many rows each of the maps has that one stacks."""
        super().add_param_group(param_group)
        self._splits |= maps_of("Muon", param_group, dimensions=2)

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        momentum = group["momentum"]
        return {
            "lr": not_negative(group["lr"]),
            "momentum": (momentum, 0 <= momentum < 1, "a number in [0, 1)"),
            "weight_decay": not_negative(group["weight_decay"]),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momenta = self.zeros(params, "momentum_buffer")
        updates = self._directions([here(p.grad) for p in params], momenta, group["momentum"], self.nesterov)
        updates = [whole(u, like=p) for u, p in zip(updates, params, strict=True)]
        self.orthogonalise_(params, updates)
        updates = [mine(u, like=p) for u, p in zip(updates, params, strict=True)]
        rate, keep = group["lr"], (1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None)
        if self.compiled:  # numbers that change must not be constants of a graph
            rate, keep = (None if x is None else like(x, updates[0]) for x in (rate, keep))
        self._descend([here(p) for p in params], updates, rate, keep)

    def orthogonalise_(self, params: list[Tensor], updates: list[Tensor]) -> None:
        """Orthogonalise whole updates (rows, columns), in place, and scale them."""
        maps = list(chain.from_iterable(u.split(self._splits[p]) for p, u in zip(params, updates, strict=True)))
        orthogonalise_(maps, self.steps, ranks_of(params[0]), self._orthogonal)
        torch._foreach_mul_(maps, [self.scale(*m.shape) for m in maps])


def like(x: float, tensor: Tensor) -> Tensor:
    """A number as a tensor without dimensions, beside another tensor and at least as precise as float32."""
    return torch.full((), x, dtype=wide(tensor.dtype), device=tensor.device)
