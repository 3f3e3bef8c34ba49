"""How long an optimizer step takes, without making it longer.

From the end of one optimizer step to the end of the next: on CUDA between two events that are read only once they have
happened, elsewhere by the clock. The chain is cut where something else comes between two steps (validation, a checkpoint),
and the first steps after a start or a resume (warm-up, compilation) are left out.

The optimizer's part is measured likewise: from the moment at which the gradients are final, clipped where they are, to the end
of its update. Lightning runs forward and backward inside `optimizer.step(closure)`, so a hook of the optimizer marks the
closure's end. An optimizer that exchanges by itself has `bytes_sent`, those of its last step, which are logged beside.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from blagpt_pl.devices import peak_flops


class Spans:
    """Milliseconds between pairs of marks, in order; a mark of CUDA is read once it has happened."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self._pending: deque[tuple[Any, Any]] = deque()
        self._taken = 0

    def add(self, start: Any, end: Any) -> None:
        """The time between two marks, when it is known."""
        self._pending.append((start, end))
        self.collect(wait=False)

    def collect(self, wait: bool) -> None:
        """Read what has happened; with `wait`, all."""
        while self._pending:
            start, end = self._pending[0]
            if isinstance(end, float):
                self.ms.append((end - start) * 1e3)
            else:
                if wait:
                    end.synchronize()
                elif not end.query():
                    return
                self.ms.append(start.elapsed_time(end))
            self._pending.popleft()

    def fresh(self) -> list[float]:
        """What has been read since the last call."""
        fresh, self._taken = self.ms[self._taken :], len(self.ms)
        return fresh


def mark(device: torch.device) -> Any:
    """This moment: in the device's stream on CUDA, on the clock elsewhere."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StepTime(L.Callback):
    """Logs perf/step_ms, perf/optimizer_ms, perf/tokens_per_s and, where device's peak and model's FLOPs are known, perf/mfu.

    And perf/sent_mib, where the optimizer says what it sends.

    Args:
        warmup: steps left out after a start or a resume.
    """

    def __init__(self, warmup: int = 10) -> None:
        self.warmup = warmup
        self.steps, self.updates = Spans(), Spans()
        self.tokens_per_step = 0
        self._skip = warmup
        self._last: Any = None
        self._update_start: Any = None
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._skip = min(self.warmup, max(0, (trainer.max_steps - trainer.global_step) // 2))
        self._last = None
        self._hooks = [hook for optimizer in trainer.optimizers for hook in self._watch(optimizer, pl_module.device)]

    def _watch(self, optimizer: Optimizer, device: torch.device) -> list[Any]:
        def before(_: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            closure: Callable[[], Any] | None = kwargs.get("closure")
            if closure is None:  # the gradients are there already: a loss scaler calls it so
                self._update_start = mark(device)
                return None

            def closure_and_mark() -> Any:
                result = closure()
                self._update_start = mark(device)
                return result

            return args, {**kwargs, "closure": closure_and_mark}

        def after(*_: Any) -> None:
            if self._last is not None and not self._skip and self._update_start is not None:
                self.updates.add(self._update_start, mark(device))
            self._update_start = None

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

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
        if window := self.steps.fresh():
            pl_module.report(self._scalars(statistics.median(window), trainer, pl_module))
        if window := self.updates.fresh():
            pl_module.report({"perf/optimizer_ms": statistics.median(window)})
        if sent := [optimizer.bytes_sent for optimizer in trainer.optimizers if hasattr(optimizer, "bytes_sent")]:
            pl_module.report({"perf/sent_mib": sum(sent) / 2**20})

    def _scalars(self, step_ms: float, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        rate = self.tokens_per_step / (step_ms / 1e3)
        scalars = {"perf/step_ms": step_ms, "perf/tokens_per_s": rate}
        if (peak := peak_flops(pl_module.device)) and (flops := pl_module.flops_per_token()):
            scalars["perf/mfu"] = rate * flops / (peak * trainer.world_size)
        return scalars

    def _mark(self, device: torch.device) -> None:
        now = mark(device)
        if self._last is not None:
            if self._skip:
                self._skip -= 1
            else:
                self.steps.add(self._last, now)
        self._last = now

    def summary(self) -> dict[str, float]:
        """Medians over the run, the 90th percentile, and tokens a second; empty if no step was timed."""
        self.steps.collect(wait=True)
        self.updates.collect(wait=True)
        if not self.steps.ms:
            return {}
        ordered = sorted(self.steps.ms)
        median = statistics.median(ordered)
        return {
            "step_ms": median,
            "step_ms_p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
            **({"optimizer_ms": statistics.median(self.updates.ms)} if self.updates.ms else {}),
            "tokens_per_s": self.tokens_per_step / (median / 1e3),
            "timed_steps": len(ordered),
        }
