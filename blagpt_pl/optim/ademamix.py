"""AdEMAMix: Adam with a second, far slower mean of the gradients beside the usual one.

Source   Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1; the warm-ups: section 3
Formula  m1 <- β1 m1 + (1 - β1) g,  m2 <- β3_t m2 + (1 - β3_t) g,  v <- β2 v + (1 - β2) g²
         p <- (1 - η λ) p - η (m1 / (1 - β1^t) + α_t m2) / (sqrt(v / (1 - β2^t)) + ε)
         with a = min(1, t / T):  α_t = a α,  half-life of β3_t = (1 - a) · that of β1 + a · that of β3
Differs  the authors' code adds 1e-8 to the betas whose half-life it takes, which moves that of 0.9999 by 1e-4 of it; here it
         is exact, and β1 may be 0. T is one for α and β3, as in the paper; that code has one for each.
Cost     three numbers a parameter of state, one more than Adam
"""

from collections.abc import Iterable, Mapping
from math import log, sqrt
from typing import Any

import torch
from torch import Tensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative
from blagpt_pl.optim.placed import here


def half_life(beta: float) -> float:
    """After how many steps a running mean has forgotten half of what it knew."""
    return log(0.5) / log(beta) if beta else 0.0


def slow_beta(start: float, end: float, done: float) -> float:
    """The decay rate whose half-life has come this part of the way, 0 to 1, from that of `start` to that of `end`."""
    if done >= 1:
        return end
    steps = (1 - done) * half_life(start) + done * half_life(end)
    return 0.5 ** (1 / steps) if steps else 0.0


class AdEMAMix(GroupOptimizer):
    """Adam whose direction adds a slow mean of the gradients, which has no bias correction.

    Args:
        params: parameters, or groups of them.
        lr: η.
        betas: β1 of the fast mean, β2 of the squares, β3 of the slow mean.
        alpha: α, how much of the slow mean is added.
        warmup: T, over how many steps α grows from 0 and β3 from β1 to their values; the paper mostly takes the length of
            the run, which an optimizer does not know. None: both have their values from the first step on.
        eps: ε.
        weight_decay: λ, decoupled: a step takes η λ of each weight.

    Raises:
        ValueError: a value out of its range.
    """

    precise = ("exp_avg",)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "warmup": warmup,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        alpha, warmup = group["alpha"], group["warmup"]
        return {
            "lr": not_negative(group["lr"]),
            "betas": betas_fit(group["betas"], 3),
            "alpha": (alpha, alpha > 0, "more than 0; without its slow mean this is AdamW"),
            "warmup": (warmup, warmup is None or warmup >= 2, "2 steps or more, or None"),
            "eps": not_negative(group["eps"]),
            "weight_decay": not_negative(group["weight_decay"]),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        (beta1, beta2, beta3), lr = group["betas"], group["lr"]
        weights, grads = [here(p) for p in params], self.precise_gradients(params)
        fast, slow, squares = (self.zeros(params, f"exp_avg{of}") for of in ("", "_slow", "_sq"))
        counts = self.count(params)
        done = [1.0 if group["warmup"] is None else min(1.0, t / group["warmup"]) for t in counts]
        betas3 = [slow_beta(beta1, beta3, a) for a in done]

        torch._foreach_lerp_(fast, grads, 1 - beta1)
        torch._foreach_mul_(slow, betas3)
        torch._foreach_add_(slow, torch._foreach_mul(grads, [1 - beta for beta in betas3]))
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)

        first = [1 - beta1**t for t in counts]  # m1 / first + α m2 = (m1 + first α m2) / first
        updates = torch._foreach_mul(slow, [group["alpha"] * a * b for a, b in zip(done, first, strict=True)])
        torch._foreach_add_(updates, fast)
        sizes = torch._foreach_sqrt(squares)
        torch._foreach_div_(sizes, [sqrt(1 - beta2**t) for t in counts])
        torch._foreach_add_(sizes, group["eps"])
        decay_(weights, lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, updates, sizes, [-lr / b for b in first])
