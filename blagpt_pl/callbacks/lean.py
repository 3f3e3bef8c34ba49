"""Lets a fit train without what Lightning does in every step for hooks and cases that are not there."""

import lightning as L

from blagpt_pl.callbacks import hooks
from blagpt_pl.callbacks.lean_step import LeanStep


class Lean(L.Callback):
    """The dispatch of `hooks` and, where it fits the run, the step of `lean_step`, while a fit trains."""

    def __init__(self) -> None:
        self._on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if LeanStep.fits(trainer):
            trainer.fit_loop.epoch_loop.advance = LeanStep(trainer).advance
        self._switch(True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("advance", None)
        vars(trainer).pop("_written_hooks", None)
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if self._on is not on:
            self._on = on
            hooks.use(1 if on else -1)
