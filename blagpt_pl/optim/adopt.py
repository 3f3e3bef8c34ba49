"""ADOPT: a gradient is divided by the root of what was known before it, clipped, and only then taken into the momentum.

Source   Taniguchi et al. 2024, arXiv:2411.02853, with the clip that the authors added later
Formula  step 1:  v = g², no update and no decay.   step t > 1:
         u = clamp(g / max(sqrt(v), ε), ±(t - 1)^c), c = 1/4;   m <- β1 m + (1 - β1) u
         W <- (1 - lr λ) W - lr m;   v <- β2 v + (1 - β2) g²
Differs  nothing. Steps count from 1 here, and the first takes none: the t of the paper's bound t^c is t - 1 here.
Cost     two numbers a parameter of state, as Adam; a step has for a moment two more, of one group at a time
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative
from blagpt_pl.optim.placed import here


class ADOPT(GroupOptimizer):
    """Adam whose second moment does not know the gradient that it divides.

    Where the first gradient of a weight is 0, as behind a projection that starts at 0 or in a row of a table whose token was
    not seen, the second one is divided by ε alone. The clip makes that a step of lr; without it the weights explode.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: β1, β2.
        eps: ε, the least divisor.
        weight_decay: λ, decoupled: a step takes lr λ of each weight.
        clip: c, the power of t - 1 that bounds what enters the momentum at step t; None for no bound, the paper's first form.

    Raises:
        ValueError: a value out of its range.
    """

    precise = ("exp_avg",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip: float | None = 0.25,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "clip": clip})

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        eps, clip = group["eps"], group["clip"]
        return {
            "lr": not_negative(group["lr"]),
            "betas": betas_fit(group["betas"]),
            "eps": (eps, eps > 0, "more than 0: a weight may have had no gradient yet"),
            "weight_decay": not_negative(group["weight_decay"]),
            "clip": (clip, clip is None or clip >= 0, "a power, 0 or more, or null for no bound"),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        steps = self.count(params)
        first = [p for p, t in zip(params, steps, strict=True) if t == 1]
        later = [p for p, t in zip(params, steps, strict=True) if t > 1]
        if first:
            self.begin(first)
        if later:
            self.go_on(later, [t for t in steps if t > 1], group)

    def begin(self, params: list[Tensor]) -> None:
        """The first step of parameters: v = g²."""
        self.zeros(params, "exp_avg")
        grads = self.precise_gradients(params)
        torch._foreach_addcmul_(self.zeros(params, "exp_avg_sq"), grads, grads)

    def go_on(self, params: list[Tensor], steps: list[int], group: dict[str, Any]) -> None:
        """A later step of parameters, whose number of it is told for each."""
        lr, clip, (beta1, beta2) = group["lr"], group["clip"], group["betas"]
        weights, grads = [here(p) for p in params], self.precise_gradients(params)
        m, v = (self.zeros(params, name) for name in ("exp_avg", "exp_avg_sq"))
        sizes = torch._foreach_sqrt(v)
        torch._foreach_clamp_min_(sizes, group["eps"])
        updates = torch._foreach_div(grads, sizes)
        if clip is not None:
            bounds = [float(t - 1) ** clip for t in steps]
            torch._foreach_clamp_max_(updates, bounds)
            torch._foreach_clamp_min_(updates, [-bound for bound in bounds])
        torch._foreach_lerp_(m, updates, 1 - beta1)
        decay_(weights, lr * group["weight_decay"])
        torch._foreach_add_(weights, m, alpha=-lr)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)
