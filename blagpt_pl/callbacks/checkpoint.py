"""Checkpoints between two steps: `last.ckpt` every so often and at the end, `best.ckpt` at the lowest validation loss.

A checkpoint is taken at the start of the next step, when everything that belongs to the last one (validation included) is
over; so every file is at a step boundary and resuming repeats or skips nothing. The best one is a second name of the file
just written, not a second write.
"""

import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint as CheckpointBase

from blagpt_pl.errors import ConfigError


class Checkpoint(CheckpointBase):
    """Saves `checkpoints/last.ckpt` and `checkpoints/best.ckpt` in the run's folder.

    Args:
        every_n_steps: optimizer steps between two saves of `last`.
        monitor: the logged value whose minimum is `best`.
    """

    def __init__(self, every_n_steps: int = 500, monitor: str = "val/loss") -> None:
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps: {every_n_steps} (expected 1 or more)")
        self.every_n_steps = every_n_steps
        self.monitor = monitor
        self.best: float = math.inf
        self.best_step = 0
        self._best_due = False
        self.saved_step = 0
        self._folder = Path()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._folder = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"

    @property
    def last_path(self) -> Path:
        """Where `last` is, or will be."""
        return self._folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """Where `best` is, or will be."""
        return self._folder / "best.ckpt"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._best_due or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise ConfigError(f"checkpoint.monitor: {self.monitor!r} is not logged here (expected one of {logged})")
        value = float(trainer.callback_metrics[self.monitor])
        if value < self.best:  # nan is never best
            self.best, self.best_step, self._best_due = value, trainer.global_step, True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write what is due, on every rank together; once a step, and never before the first one."""
        step = trainer.global_step
        if trainer.fast_dev_run or (step == self.saved_step and not self._best_due):
            return
        self.saved_step = step
        best_due, self._best_due = self._best_due, False
        trainer.save_checkpoint(self.last_path, weights_only=False)
        if best_due and trainer.is_global_zero:
            self._name_best()

    def _name_best(self) -> None:
        temporary = self.best_path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.last_path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(self.last_path, temporary)
        temporary.replace(self.best_path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
