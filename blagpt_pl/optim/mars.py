"""MARS-AdamW: each gradient is carried on in the direction in which it changed, cut to norm 1, and taken by AdamW.

Source   Yuan et al. 2024, arXiv:2411.10438, algorithm 2 in its approximate form: the previous gradient is the one of the
         previous batch, so that no gradient is computed twice
Formula  c = g + γ β1 / (1 - β1) (g - g_prev);  c <- c / max(1, |c|), the norm over the whole tensor
         m <- β1 m + (1 - β1) c,  v <- β2 v + (1 - β2) c²
         p <- (1 - η λ) p - η (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + ε)
         Groups of role `vector`, and those that drive a recurrence: AdamW, that is c = g, with learning rate and betas of their own.
Differs  in its first step a tensor has no previous gradient and c = g, as in the paper, where x_0 = x_1; the authors' code
         begins with g_prev = 0. That code also keeps the gradient itself, not a copy: where its memory is used again, g_prev
         is g and nothing is corrected. It goes by the number of dimensions, two or not two; here the role decides.
Cost     three numbers a parameter of state, two for vectors; sharded, one all-reduce of a number a tensor for each group
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative
from blagpt_pl.optim.placed import here, summed
from blagpt_pl.optim.roles import OWN

VECTORS = ("vector", *OWN)  # roles


class MARS(GroupOptimizer):
    """AdamW on gradients of less variance. Vectors (gains, biases, scalars; all that drives a recurrence) are left to plain AdamW.

    Args:
        params: parameter groups with a `role`, or tensors, which are then taken as matrices.
        lr: η of all groups but vectors.
        betas: β1 and β2 of all groups but vectors.
        gamma: γ, how far a gradient is carried on.
        vector_lr: η of vectors, or None where it is `lr`; the authors take half of it.
        vector_betas: β1 and β2 of vectors.
        eps: ε.
        weight_decay: λ, decoupled: a step takes η λ of each weight.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 6e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        gamma: float = 0.025,
        vector_lr: float | None = None,
        vector_betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._of_vectors = {"lr": lr if vector_lr is None else vector_lr, "betas": vector_betas}
        defaults = {"lr": lr, "betas": betas, "gamma": gamma, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group; one of vectors has no `gamma`, and its learning rate and betas are those of vectors."""
        vectors = param_group.get("role") in VECTORS
        super().add_param_group({**self._of_vectors, **param_group} if vectors else param_group)
        if vectors:
            del self.param_groups[-1]["gamma"]

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        of = "vector_" if group.get("role") in VECTORS else ""
        return {
            f"{of}lr": not_negative(group["lr"]),
            f"{of}betas": betas_fit(group["betas"]),
            "gamma": not_negative(group["gamma"]),
            "eps": not_negative(group["eps"]),
            "weight_decay": not_negative(group["weight_decay"]),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        weights, counts = [here(p) for p in params], self.count(params)
        grads = self.corrected(params, counts, group) if "gamma" in group else [here(p.grad) for p in params]
        means, squares = self.zeros(params, "exp_avg"), self.zeros(params, "exp_avg_sq")
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, [sqrt(1 - beta2**t) for t in counts])
        torch._foreach_add_(sizes, group["eps"])
        decay_(weights, lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, means, sizes, [-lr / (1 - beta1**t) for t in counts])

    def corrected(self, params: list[Tensor], counts: list[int], group: dict[str, Any]) -> list[Tensor]:
        """New tensors, this rank's part of each c; remembers a copy of each gradient for the next step."""
        grads, previous = [here(p.grad) for p in params], self.zeros(params, "previous_grad")
        for old, grad, t in zip(previous, grads, counts, strict=True):
            if t == 1:
                old.copy_(grad)
        beta1 = group["betas"][0]
        c = list(torch._foreach_lerp(previous, grads, 1 + group["gamma"] * beta1 / (1 - beta1)))  # beyond the gradient
        torch._foreach_copy_(previous, grads)
        torch._foreach_div_(c, list(norms(c, params).clamp(min=1).unbind()))
        return c


def norms(parts: list[Tensor], like: list[Tensor]) -> Tensor:
    """(n,): of n tensors, of which `parts` are on this rank, placed like parameters, the norms of the whole; waits for nothing.

    The parameters of a group are placed alike, since one model is sharded in one way.
    """
    dtype = reduce(torch.promote_types, (x.dtype for x in parts), torch.float32)
    found = torch.stack(torch._foreach_norm(parts, 2, dtype))
    return summed(found.square(), like[0]).sqrt() if isinstance(like[0], DTensor) else found
