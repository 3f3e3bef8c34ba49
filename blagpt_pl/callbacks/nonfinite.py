"""A run that has diverged stops, says where, and leaves its last good checkpoint alone.

The loss and the norm of the gradients are looked at whenever they are logged, the parameters whenever they are about to be
saved, so a checkpoint never holds a number that is not finite, and no step waits for the look. Both are the same on every
rank (means and norms over all of them), so all ranks leave together.
"""

import math
from typing import Any

import lightning as L
import torch

from blagpt_pl.errors import Diverged

WATCHED = ("train/loss", "grad_norm", "val/loss")


class NonFinite(L.Callback):
    """Raises `Diverged` for a loss, a gradient norm or a parameter that is not finite."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step and pl_module.log_due(step):
            self._look(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._look(trainer)

    def _look(self, trainer: L.Trainer) -> None:
        metrics = trainer.callback_metrics
        for name in WATCHED:
            value = float(metrics.get(name, 0.0))
            if not math.isfinite(value):
                raise Diverged(f"step {trainer.global_step}: {name} is {value}; fix: {self._fix(trainer)}")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in pl_module.parameters()]
        broken = torch.stack([~p.detach().isfinite().all() for p in local]).any().float()
        if trainer.strategy.reduce(broken, reduce_op="max"):
            raise Diverged(f"step {trainer.global_step}: a parameter is not finite; fix: {self._fix(trainer)}")

    @staticmethod
    def _fix(trainer: L.Trainer) -> str:
        kept = [str(c.last_path) for c in trainer.checkpoint_callbacks if getattr(c, "saved_step", 0)]
        last = f"; the last good checkpoint is {kept[0]}" if kept else ""
        return f"a lower learning rate, a longer warm-up, or trainer.gradient_clip_val: 1.0{last}"
