"""Peak memory, training and evaluation apart.

`perf/peak_vram_mib` is the most that torch had allocated on the accelerator at one time since training began (0 on a
machine without one); `perf/peak_ram_mib` is the most that the process held of the machine's own memory.
"""

import resource
import sys
from typing import Any

import lightning as L
import torch

MIB = 2**20


def peak_ram_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


class PeakVRAM(L.Callback):
    """Logs perf/peak_vram_mib and perf/peak_ram_mib, and keeps the peaks of training and evaluation apart."""

    def __init__(self) -> None:
        self.train_mib = 0.0
        self.eval_mib = 0.0
        self._ranks = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take(pl_module.device)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train_mib = max(self.train_mib, self._take(pl_module.device))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.eval_mib = max(self.eval_mib, self._take(pl_module.device))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.log_due(trainer.global_step):
            return
        if pl_module.device.type == "cuda":
            self.train_mib = max(self.train_mib, torch.cuda.max_memory_allocated(pl_module.device) / MIB)
        pl_module.report({"perf/peak_vram_mib": self.train_mib, "perf/peak_ram_mib": peak_ram_mib()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.train_mib = max(self.train_mib, self._take(pl_module.device))
        peaks = torch.tensor([self.train_mib, self.eval_mib], device=pl_module.device)
        self.train_mib, self.eval_mib = trainer.strategy.reduce(peaks, reduce_op="max").tolist()

    @staticmethod
    def _take(device: torch.device) -> float:
        if device.type != "cuda":
            return 0.0
        peak = torch.cuda.max_memory_allocated(device) / MIB
        torch.cuda.reset_peak_memory_stats(device)
        return peak
