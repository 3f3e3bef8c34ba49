"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioners.

Source   Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, algorithm 3; `palm`: the
         second decay of Chowdhery et al. 2022 ("PaLM"), arXiv:2204.02311, section 5, as HeavyBall's SOAP has it
Formula  G' = Q^T G P;  M <- β1 M + (1 - β1) G',  V <- β2 V + (1 - β2) G'^2, both debiased;  U = M / (sqrt(V) + ε)
         W <- (1 - η λ) W - η Q U P^T;  L <- βs L + (1 - βs) G G^T,  R <- βs R + (1 - βs) G^T G
         Every so many steps Q <- qr(L Q), P <- qr(R P), and M turns with them. Step 1 takes L, R and their eigenvectors Q, P
         and leaves W as it is. `palm`: β2 = 1 - t^-0.8 at step t.
Differs  ε is added to the debiased root, and weights decay before the update, both as in torch's AdamW. The columns of Q are
         ordered by eigenvalue for the QR alone, so that V stays as it is: the same numbers in another order. A matrix that
         stacks several maps (a group's `splits`) is taken map by map, a tensor of more dimensions as (rows, all others).
         Preconditioners are float32, or float64 where the weights are. Ranks share the decompositions (`optim.orthogonal`).
Cost     M and V as Adam, and 2 n² numbers for each side n of a map; six products a map and step, one QR a side and turn
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative, wide
from blagpt_pl.optim.orthogonal import orthogonalise_
from blagpt_pl.optim.placed import here, mine, ranks_of, whole
from blagpt_pl.optim.roles import maps_of

PALM = 0.8
Sides = tuple[
    Tensor | None, Tensor | None
]  # of a map (r, c): of its rows (r, r) and columns (c, c); None for the identity


def eigenvectors(batches: list[list[Tensor]], steps: int) -> list[Tensor]:
    """Of each list of symmetric matrices (n, n): their eigenvectors, that of the largest eigenvalue first."""
    return [torch.linalg.eigh(torch.stack(batch))[1].flip(-1) for batch in batches]


def orthonormal(batches: list[list[Tensor]], steps: int) -> list[Tensor]:
    """Of each list of matrices (n, n): orthonormal columns, the first k of which span what their first k do."""
    return [torch.linalg.qr(torch.stack(batch))[0] for batch in batches]


def turned(x: Tensor, sides: Sides) -> Tensor:
    """Q^T X P."""
    left, right = sides
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def backwards(sides: Sides) -> Sides:
    """The bases that undo a turn."""
    left, right = (None if side is None else side.mT for side in sides)
    return left, right


def debiased(beta: float, n: int) -> float:
    """The decay of the n-th value by which a running mean is as if debiased ever since the first."""
    return 1 - (1 - beta) / (1 - beta**n)


class SOAP(GroupOptimizer):
    """Adam in Shampoo's eigenbasis. For matrices alone: embeddings, heads and vectors belong to another (`Composite`).

    Args:
        params: parameter groups of role `matrix`, or tensors of two or more dimensions.
        lr: η.
        betas: β1 and β2.
        shampoo_beta: βs; β2 if None.
        eps: ε.
        weight_decay: λ, decoupled: a step takes η λ of each weight.
        precondition_frequency: steps from one QR to the next.
        max_precond_dim: a side longer than this keeps the identity as its basis.
        palm: β2 grows with the steps; that of `betas` is then βs alone.

    Raises:
        ValueError: a value out of its range or without effect, or a tensor that is no matrix of the network's inside.
    """

    precise = ("moments", "basis")

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        precondition_frequency: int = 10,
        max_precond_dim: int = 2048,
        palm: bool = False,
    ) -> None:
        if max_precond_dim < 2:
            raise ValueError(f"SOAP.max_precond_dim: {max_precond_dim} (expected 2 or more; without bases it is Adam)")
        self.max_precond_dim, self.palm = max_precond_dim, palm
        self._splits: dict[Tensor, tuple[int, ...]] = {}
        values = {"lr": lr, "betas": betas, "shampoo_beta": shampoo_beta, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**values, "precondition_frequency": precondition_frequency})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in matrices; their `splits`, if the group has some, say how many rows each of the maps has that one stacks."""
        super().add_param_group(param_group)
        self._splits |= maps_of("SOAP", param_group)

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        own, every = group["shampoo_beta"], group["precondition_frequency"]
        expected = (
            "null: with palm the second of betas is that of the preconditioners" if self.palm else "in [0, 1), or null"
        )
        return {
            "lr": not_negative(group["lr"]),
            "betas": betas_fit(group["betas"]),
            "shampoo_beta": (own, own is None or (0 <= own < 1 and not self.palm), expected),
            "eps": not_negative(group["eps"]),
            "weight_decay": not_negative(group["weight_decay"]),
            "precondition_frequency": (every, every >= 1, "1 or more"),
        }

    # ------------------------------------------------------------------ a step

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        counts = self.count(params)
        means, squares = self.zeros(params, "exp_avg"), self.zeros(params, "exp_avg_sq")
        grads = [self.maps(p, whole(here(p.grad), like=p)) for p in params]
        later = [i for i, n in enumerate(counts) if n > 1]
        if later:
            some = ([values[i] for i in later] for values in (params, counts, means, squares, grads))
            self.descend(*some, group)
        self.observe(params, counts, grads, group)
        every = group["precondition_frequency"]
        due = [i for i in later if (counts[i] - 1) % every == 0]
        if due:
            self.turn([params[i] for i in due], [means[i] for i in due])

    def descend(
        self,
        params: list[Tensor],
        counts: list[int],
        means: list[Tensor],
        squares: list[Tensor],
        grads: list[list[Tensor]],
        group: dict[str, Any],
    ) -> None:
        """Adam in the present bases."""
        (first, second), lr = group["betas"], group["lr"]
        seen = [self.part(p, map(turned, maps, self.sides(p, "basis"))) for p, maps in zip(params, grads, strict=True)]
        keep = [debiased(first, n - 1) for n in counts]
        torch._foreach_mul_(means, keep)
        torch._foreach_add_(means, torch._foreach_mul(seen, [1 - beta for beta in keep]))
        keep = [debiased(1 - n**-PALM if self.palm else second, n - 1) for n in counts]
        torch._foreach_mul_(squares, keep)
        torch._foreach_addcmul_(squares, seen, seen, [1 - beta for beta in keep])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["eps"])
        updates = []
        for p, u in zip(params, torch._foreach_div(means, roots), strict=True):
            updates.append(
                self.part(p, map(turned, self.maps(p, whole(u, like=p)), map(backwards, self.sides(p, "basis"))))
            )
        weights = [here(p) for p in params]
        decay_(weights, lr * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-lr)

    def observe(
        self, params: list[Tensor], counts: list[int], grads: list[list[Tensor]], group: dict[str, Any]
    ) -> None:
        """Take the gradients into the preconditioners; those seen for the first time give the first bases."""
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        moments, products, fresh = [], [], []
        for p, n, maps in zip(params, counts, grads, strict=True):
            if n == 1:
                fresh.append(p)
            for g, sides in zip(maps, self.sides(p, "moments"), strict=True):
                for side, one in zip(sides, (g, g.mT), strict=True):
                    if side is not None:
                        moments.append(side)
                        products.append(one @ one.mT)
        torch._foreach_mul_(moments, beta)
        torch._foreach_add_(moments, products, alpha=1 - beta)
        if bases := present(self.sides(p, "basis") for p in fresh):
            torch._foreach_copy_(bases, present(self.sides(p, "moments") for p in fresh))
            orthogonalise_(bases, 0, ranks_of(params[0]), eigenvectors)

    def turn(self, params: list[Tensor], means: list[Tensor]) -> None:
        """Bring the bases nearer to the eigenvectors, and the means of the gradient into the new ones."""
        bases = present(self.sides(p, "basis") for p in params)
        ahead, orders = [], []
        for moments, basis in zip(present(self.sides(p, "moments") for p in params), bases, strict=True):
            image = moments @ basis
            orders.append((basis * image).sum(0).argsort(descending=True, stable=True))
            ahead.append(image[:, orders[-1]].contiguous())
        orthogonalise_(ahead, 0, ranks_of(params[0]), orthonormal)
        turns = {}
        for basis, order, columns in zip(bases, orders, ahead, strict=True):
            new = torch.empty_like(columns)
            new[:, order] = columns
            turns[id(basis)] = basis.mT @ new
            basis.copy_(new)
        for p, mean in zip(params, means, strict=True):
            steps = [tuple(None if b is None else turns[id(b)] for b in sides) for sides in self.sides(p, "basis")]
            mean.copy_(self.part(p, map(turned, self.maps(p, whole(mean, like=p)), steps)))

    # ------------------------------------------------------------------ maps and what is kept of them

    def maps(self, p: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The maps (r, c) that a whole tensor stacks, as precise as the preconditioners."""
        return x.flatten(1).to(wide(p.dtype)).split(self._splits[p])

    def part(self, p: Tensor, maps: Iterable[Tensor]) -> Tensor:
        """This rank's part of the tensor that stacks these maps, in the parameter's own precision."""
        return mine(torch.cat(list(maps)).reshape(p.shape).to(p.dtype), like=p)

    def sides(self, p: Tensor, name: str) -> list[Sides]:
        """The matrices of that name, zero before the first step, for the two sides of each map; written in place."""
        state, dtype, found = self.state[p], wide(p.dtype), []
        for i, rows in enumerate(self._splits[p]):
            pair = []
            for side, n in (("rows", rows), ("columns", p.numel() // p.shape[0])):
                key = f"{name}_{side}_{i}"
                if key not in state and 1 < n <= self.max_precond_dim:
                    state[key] = torch.zeros(n, n, dtype=dtype, device=p.device)
                pair.append(state.get(key))
            found.append(tuple(pair))
        return found


def present(sides: Iterable[list[Sides]]) -> list[Tensor]:
    """All matrices of many maps that are not the identity."""
    return [side for pairs in sides for pair in pairs for side in pair if side is not None]


class PaLMForeachSOAP(SOAP):
    """SOAP with PaLM's second decay, by the name that it had in HeavyBall 1.x, whose values it has: `SOAP(palm=True)`.

    Args:
        params: parameter groups of role `matrix`, or tensors of two or more dimensions.
        lr: η.
        betas: β1, and the decay of the preconditioners.
        eps: ε.
        weight_decay: λ, decoupled.
        precondition_frequency: steps from one QR to the next.
        max_precond_dim: a side longer than this keeps the identity as its basis.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int = 2,
        max_precond_dim: int = 2048,
    ) -> None:
        values = {"eps": eps, "weight_decay": weight_decay, "precondition_frequency": precondition_frequency}
        super().__init__(params, lr, betas, max_precond_dim=max_precond_dim, palm=True, **values)
