"""SIGTERM and SIGINT: finish the step, save, and leave with 143 or 130, on every rank, without a hang.

Lightning 2.6 broadcasts inside its signal handler (which hangs when every rank is signalled, as torchrun and SLURM do),
broadcasts once more in each step, and ends with code 0. Here the handler only sets a flag. At the start of each step the
ranks begin to take the maximum of their flags over a CPU group, and read it at the start of the next one, when it has long been
made: nobody waits, and all act at the same step. A second signal leaves at once.
"""

import os
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from blagpt_pl.callbacks.checkpoint import Checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class GracefulStop(L.Callback):
    """Turns a signal into a checkpoint and an exit at the next step boundary."""

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[torch.Tensor, dist.Work] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._asked = None
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        number = self._agree()
        if not number:
            self._ask()
            return
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        launcher = trainer.strategy.launcher
        # the parent of a spawned rank kills rank 0 if that rank leaves with a code other than 0
        spawned = launcher is not None and trainer.global_rank > 0
        raise SystemExit(0 if spawned else 128 + number)

    def _ask(self) -> None:
        if self._group is not None:
            flag = torch.tensor(self._received)
            self._asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _agree(self) -> int:
        """The signal that any rank had received when the ranks last asked one another, or 0."""
        if self._group is None:
            return self._received
        if self._asked is None:
            return 0
        (flag, work), self._asked = self._asked, None
        work.wait()
        return int(flag)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agree()  # nothing of the group's is under way when it is taken down

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
