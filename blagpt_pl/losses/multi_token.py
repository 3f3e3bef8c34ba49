"""Multi-token prediction: beside the model's own head, n - 1 more, which predict the tokens after the next one.

Source   Gloeckle et al. 2024, "Better & Faster Large Language Models via Multi-token Prediction", arXiv:2404.19737, eq. (2)
Formula  z = trunk(x);  f_1 = the model's last block, f_i = a block of head i's own, in its place;
         total = Σ_{i=1..n} CE(head(norm(f_i(z)))_t, x_{t+i});  the norm and the head are shared; a target beyond the end
         of the sequence is `IGNORE`, and each mean is over the targets that count
How      head by head (its §2, "Memory-efficient implementation"): forward of one head, its gradients by the trunk, the shared
         parts and its block, and its activations are let go before the next one begins
Differs  the paper takes n - 1 layers out of the trunk, so that parameters stay equal; here `model.n_layers` says so
Cost     n - 1 blocks of parameters; n - 1 more blocks and heads of FLOPs a token; the activations of one block and the
         logits of one chunk, whatever n is
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.stored import gradients, stored, unkept
from blagpt_pl.losses.term import BlockFactory, TrunkTerm
from blagpt_pl.nn.base import Carry, Site, built


def ahead(targets: Tensor, steps: int) -> Tensor:
    """(B, T) targets -> (B, T), those that stand `steps` later; `IGNORE` where the sequence has ended."""
    return F.pad(targets, (0, steps), value=IGNORE)[:, steps:]


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Sum of two gradients, None being nothing; of 16 bit, it is made in float32."""
    if b is None:
        return a
    return b if a is None else a.to(torch.promote_types(a.dtype, torch.float32)) + b


class MultiToken(TrunkTerm):
    """Predict the next n tokens, of which the model's own head predicts the first.

    Args:
        site: where the model's last block stands.
        block: what the model repeats; each further head owns one.
        n: how many tokens are predicted; 1 adds nothing.

    Raises:
        ValueError: n is below 1, or above the context, where no target would be left; later, a sequence shorter than n.
    """

    name = "multi_token"

    def __init__(self, site: Site, block: BlockFactory, n: int) -> None:
        super().__init__()
        if not 1 <= n <= site.context:
            raise ValueError(f"MultiToken.n: {n} (expected 1 to {site.context}, the context)")
        self.head_passes = n - 1
        self.blocks = nn.ModuleList(built("MultiToken.block", block, site) for _ in range(n - 1))

    def regions(self) -> Iterable[nn.Module]:
        return self.blocks

    def forward(
        self, model: nn.Module, trunk: Tensor, carry: Carry, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.blocks:
            return trunk.new_zeros(()), {}
        if targets.shape[1] <= self.head_passes:
            raise ValueError(
                f"MultiToken.n: {self.head_passes + 1} tokens to predict, but only {targets.shape[1]} a sequence "
                "(expected at least as many); fix: a smaller n or longer sequences"
            )
        shared = [p for module in model.readout() for p in module.parameters()]
        streams = [trunk, carry.x0, *carry.memo.values()]
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in streams]
        parameters = list({id(p): p for p in (*self.parameters(), *shared)}.values())
        differentiable = torch.is_grad_enabled()
        inputs = [t for t in (*streams, *parameters) if differentiable and t.requires_grad]
        by = [t for t in (*leaves, *parameters) if differentiable and t.requires_grad]
        make = partial(self.head_by_head, model, leaves, carry, targets, by)
        total, losses = stored(make, inputs)
        return total, {f"{self.name}_{i}": loss for i, loss in enumerate(losses, 2)}

    def head_by_head(
        self, model: nn.Module, leaves: list[Tensor], carry: Carry, targets: Tensor, by: list[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Every head's loss (n - 1,), and the gradients of their sum; only one head's graph is ever alive.

        Args:
            model, carry, targets: as for `forward`.
            leaves: the trunk, x0 and the memo's tensors, cut off from what made them.
            by: what is differentiated by.
        """
        losses, sums = [], [None] * len(by)
        for steps, block in enumerate(self.blocks, 1):
            loss, grads = self.one_head(model, block, leaves, carry, ahead(targets, steps), by)
            losses.append(loss)
            sums = [plus(a, b) for a, b in zip(sums, grads, strict=True)]
            del grads
        return torch.stack(losses), sums

    @staticmethod
    def one_head(
        model: nn.Module, block: nn.Module, leaves: list[Tensor], carry: Carry, targets: Tensor, by: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """One head's loss and its gradients."""
        with torch.set_grad_enabled(bool(by)):
            trunk, x0, *memo = (unkept(leaf) for leaf in leaves)
            carry = carry.but(x0, dict(zip(carry.memo, memo, strict=True)))
            loss = model.next_token(model.finish(trunk, carry, block), targets)
            if not by:
                return loss, ()
            n = targets.numel()  # the mean's gradients would vanish in float16, where no scaler has enlarged them yet
            return loss.detach(), tuple(None if g is None else g / n for g in gradients(n * loss, by))
