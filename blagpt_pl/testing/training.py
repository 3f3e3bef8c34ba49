"""The promises of a model that need a real run: accumulation here, and those of `resuming` and of `updates`.

Accumulation  n micro-batches of one sequence give the gradients and the logged numbers of one micro-batch of n sequences, and
              those are the gradients of `objective`. n is 2, and 3, since two wrong weights may cancel. In eval mode, for
              each micro-batch has its own dropout.
"""

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor

from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing.promises import CLOSE, noisy
from blagpt_pl.testing.resuming import check_resume
from blagpt_pl.testing.running import Batch, aside, fit, random_batches
from blagpt_pl.testing.updates import check_optimizer

__all__ = ["check_accumulation", "check_optimizer", "check_resume"]


class Gradients(L.Callback):
    """The gradients that reach the optimizer, by name."""

    def __init__(self) -> None:
        self.of: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.of = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def gradients_of_objective(model: L.LightningModule, batch: Batch) -> dict[str, Tensor]:
    """By name, the gradients of one pass over all sequences of a batch (A, B, T)."""
    model = copy.deepcopy(model).cpu()
    model.objective(*(t.flatten(0, 1) for t in batch))[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference between two sets of tensors by name, an absent one being zero; and whose it is."""
    zero = torch.zeros(())
    names = sorted(found.keys() | expected.keys())
    gaps = [((found.get(name, zero) - expected.get(name, zero)).abs().max().item(), name) for name in names]
    return max(gaps, key=lambda gap: (gap[0] != gap[0], gap[0]), default=(0.0, "any parameter"))  # nan is the farthest


def check_accumulation(model: L.LightningModule) -> str:
    """Several micro-batches of one sequence are one micro-batch of several.

    Args:
        model: a `LanguageModel`, freshly built; left as it was.

    Raises:
        AssertionError: gradients or logged numbers differ by more than `CLOSE`, relative to the largest of them.
    """
    worst = 0.0
    with aside():
        moved = noisy(model).eval()
        moved.schedule_factory = Constant
        for n in (2, 3):
            (batch,) = random_batches(model, 1, n, 1)
            expected = gradients_of_objective(moved, batch)
            scale = max((g.abs().max().item() for g in expected.values()), default=0.0) or 1.0
            logs = []
            for a in (1, n):
                watch = Gradients()
                trainer = fit(moved, [tuple(t.reshape(a, n // a, -1) for t in batch)], watch)
                logs.append({k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
                gap, name = farthest(watch.of, expected)
                assert gap <= CLOSE * scale, (
                    f"in {a} micro-batch{'es' if a > 1 else ''} of {n // a}, the gradient of {name} differs by {gap:.1e} "
                    f"from that of the objective over the same {n} sequences; the largest is {scale:.1e}"
                )
                worst = max(worst, gap / scale)
            gap, name = farthest(*logs)
            assert gap <= CLOSE * max(1.0, *(v.abs().item() for v in logs[0].values())), (
                f"{name} is logged as {float(logs[1].get(name, 0)):.6f} in {n} micro-batches of 1, as "
                f"{float(logs[0].get(name, 0)):.6f} in one of {n}"
            )
    return f"gradients of 2 and 3 micro-batches differ by {worst:.1e} from those of one"
