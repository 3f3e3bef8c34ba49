"""AdamW with independent weight decay: the decay follows the schedule, and not the learning rate that the schedule scales.

Source   Wortsman et al. 2023, arXiv:2309.14322, section 3.2.2, after Loshchilov & Hutter 2017, arXiv:1711.05101
Formula  s_t = lr_t / lr_peak where a schedule is attached, 1 otherwise;   W <- (1 - λ s_t) W
         m <- β1 m + (1 - β1) g;   v <- β2 v + (1 - β2) g²;   W <- W - lr_t m̂ / (sqrt(v̂) + ε)
Differs  nothing: torch's AdamW decays by lr_t λ, and with λ / lr_peak in place of λ it is this one, at that learning rate alone
Cost     as AdamW: two numbers a parameter of state, and one more pass over the weights that decay
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative
from blagpt_pl.optim.placed import here


class AdamWIndependent(GroupOptimizer):
    """Torch's AdamW, its weights decayed by `weight_decay` times the schedule's factor.

    The factor is lr / `initial_lr` of a group, which torch's schedulers write there; without one it is 1. At lr 0 nothing
    decays in either case: torch takes such a step to make the state that a sharded checkpoint is loaded into.

    Args:
        params: tensors or parameter groups.
        lr: the peak learning rate.
        betas: β1, β2.
        eps: ε, added to sqrt(v̂).
        weight_decay: λ, the share of each weight that a step at the peak takes.
        fused: whether torch's fused kernel makes the step; counts of steps then lie beside the weights.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        fused: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        lr, decay = group["lr"], group["weight_decay"]
        return {
            "lr": (lr, lr > 0, "more than 0, since the decay follows what a schedule makes of it"),
            "betas": betas_fit(group["betas"]),
            "eps": not_negative(group["eps"]),
            "weight_decay": (decay, 0 <= decay < 1, "a number in [0, 1), which is not scaled by lr"),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, fused, (beta1, beta2) = group["lr"], group["fused"], group["betas"]
        weights = [here(p) for p in params]
        factor = lr / group.get("initial_lr", lr) if lr else 0.0
        decay_(weights, group["weight_decay"] * factor)
        adamw(
            weights,
            [here(p.grad) for p in params],
            self.zeros(params, "exp_avg"),
            self.zeros(params, "exp_avg_sq"),
            [],
            [self.steps_of(p, fused) for p in params],
            fused=fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )

    def steps_of(self, p: Tensor, fused: bool) -> Tensor:
        """The count of a parameter's steps, to which torch adds one: on the host, or where a fused kernel reads it."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=here(p).device if fused else "cpu")
        return state["step"]
