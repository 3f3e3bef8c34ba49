"""C-AdamW: AdamW that leaves out what its momentum and the gradient disagree about, and enlarges the rest.

Source   Liang et al. 2024, "Cautious Optimizers", arXiv:2411.16085, algorithm 1 on AdamW; the bound from the authors' code
Formula  m, v, m̂, v̂ as in Adam;   φ = 1[m g > 0];   s = max(mean φ, floor), the mean over the whole tensor
         W <- (1 - lr λ) W - lr (φ / s) m̂ / (sqrt(v̂) + ε)
Differs  the paper adds an ε to mean φ. Where few numbers of a table have a gradient, φ is 0 nearly everywhere and the rest of
         the update explodes; the authors' code (C-Optim, 6ff3ff5) bounds the mean from below instead, which is done here.
         Signs are compared and not multiplied as numbers, since a product of small ones is 0.
Cost     as AdamW: two numbers a parameter of state; a step has for a moment two more, of one group at a time
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from blagpt_pl.optim.base import Check, GroupOptimizer, betas_fit, decay_, not_negative
from blagpt_pl.optim.placed import here, summed


class CAdamW(GroupOptimizer):
    """AdamW, cautious.

    Under FSDP2 the mean is over all shards of a tensor: ranks add up their counts in one all-reduce for each group, whose
    tensors are sharded alike. No step waits for a device.

    Args:
        params: tensors or parameter groups.
        lr: learning rate.
        betas: β1, β2.
        eps: ε, added to sqrt(v̂).
        weight_decay: λ, decoupled: a step takes lr λ of each weight, also where the rest of its update is left out.
        floor: the least share that is made up for; no update grows by more than 1 / floor.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "floor": floor})

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        beta1, floor = group["betas"][0], group["floor"]
        return {
            "lr": not_negative(group["lr"]),
            "betas": betas_fit(group["betas"]),
            "betas[0]": (beta1, beta1 != 0, "more than 0: without a momentum nothing can disagree with it"),
            "eps": not_negative(group["eps"]),
            "weight_decay": not_negative(group["weight_decay"]),
            "floor": (floor, 0 < floor <= 1, "a share, in (0, 1]"),
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        steps = self.count(params)
        weights, grads = [here(p) for p in params], [here(p.grad) for p in params]
        m, v = self.zeros(params, "exp_avg"), self.zeros(params, "exp_avg_sq")
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, value=1 - beta2)

        updates = agreeing(m, grads)
        shares = means(updates, params)
        torch._foreach_clamp_min_(shares, group["floor"])
        torch._foreach_mul_(updates, m)
        torch._foreach_div_(updates, shares)

        sizes = torch._foreach_sqrt(v)
        torch._foreach_div_(sizes, [(1 - beta2**t) ** 0.5 for t in steps])
        torch._foreach_add_(sizes, group["eps"])
        decay_(weights, lr * group["weight_decay"])
        torch._foreach_addcdiv_(weights, updates, sizes, [-lr / (1 - beta1**t) for t in steps])


def agreeing(momenta: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """φ, new tensors: 1 where both have the same sign, 0 elsewhere and where one of them is 0."""
    masks = torch._foreach_sign(momenta)
    torch._foreach_mul_(masks, torch._foreach_sign(grads))
    torch._foreach_clamp_min_(masks, 0)
    return masks


def means(masks: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The mean of each mask over its whole tensor, without dimensions, float32 or wider; placed like parameters of a group."""
    wide = torch.promote_types(masks[0].dtype, torch.float32)
    sums = summed(torch.stack(torch._foreach_norm(masks, 1, dtype=wide)), params[0])
    return list(torch._foreach_div(list(sums.unbind()), [float(p.numel()) for p in params]))
