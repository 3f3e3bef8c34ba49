"""How long an optimizer step takes, without making it longer.

From the end of one optimizer step to the end of the next: on CUDA between two events that are read only once they have
happened, elsewhere by the clock. The chain is cut where something else comes between two steps (validation, a checkpoint),
and the first steps after a start or a resume (warm-up, compilation) are left out.
"""

import statistics
import time
from collections import deque
from typing import Any

import lightning as L
import torch

from blagpt_pl.devices import peak_flops


class StepTime(L.Callback):
    """Logs perf/step_ms, perf/tokens_per_s and, where the device's peak and all FLOPs of the model are known, perf/mfu.

    Args:
        warmup: steps left out after a start or a resume.
    """

    def __init__(self, warmup: int = 10) -> None:
        self.warmup = warmup
        self.times_ms: list[float] = []
        self.tokens_per_step = 0
        self._skip = warmup
        self._logged = 0
        self._last: Any = None
        self._pending: deque[tuple[Any, Any]] = deque()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._skip = min(self.warmup, max(0, (trainer.max_steps - trainer.global_step) // 2))
        self._last = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._last = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens_per_step = pl_module.tokens_per_step
        self._mark(pl_module.device)
        if not pl_module.log_due(trainer.global_step):
            return
        window = self.times_ms[self._logged :]
        if not window:
            return
        self._logged = len(self.times_ms)
        pl_module.log_dict(self._scalars(statistics.median(window), trainer, pl_module))

    def _scalars(self, step_ms: float, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        rate = self.tokens_per_step / (step_ms / 1e3)
        scalars = {"perf/step_ms": step_ms, "perf/tokens_per_s": rate}
        if (peak := peak_flops(pl_module.device)) and (flops := pl_module.flops_per_token()):
            scalars["perf/mfu"] = rate * flops / (peak * trainer.world_size)
        return scalars

    def _mark(self, device: torch.device) -> None:
        if device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if self._last is not None:
            if self._skip:
                self._skip -= 1
            else:
                self._pending.append((self._last, now))
        self._last = now
        self._collect(wait=False)

    def _collect(self, wait: bool) -> None:
        while self._pending:
            start, end = self._pending[0]
            if isinstance(end, float):
                self.times_ms.append((end - start) * 1e3)
            else:
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                self.times_ms.append(start.elapsed_time(end))
            self._pending.popleft()

    def summary(self) -> dict[str, float]:
        """Median and 90th percentile over the run, and tokens a second; empty if no step was timed."""
        self._collect(wait=True)
        if not self.times_ms:
            return {}
        ordered = sorted(self.times_ms)
        median = statistics.median(ordered)
        return {
            "step_ms": median,
            "step_ms_p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
            "tokens_per_s": self.tokens_per_step / (median / 1e3),
            "timed_steps": len(ordered),
        }
