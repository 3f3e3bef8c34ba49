"""A few steps of a run as a Chrome trace: what ran when, on the host and on the device, and from which line of Python.

Opens in Perfetto (https://ui.perfetto.dev) or chrome://tracing. Steps that are traced take longer, so they are no steps to
time; those before and after them are as always.
"""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.profilers import PyTorchProfiler

from blagpt_pl.errors import ConfigError


class Trace(L.Callback):
    """Writes `trace.json.gz` into the run's folder (`trace-<rank>.json.gz` on other ranks than 0).

    A run that is resumed traces its first steps, too, if they come later: into `trace-from-<step>.json.gz`.

    Args:
        first_step: optimizer steps before it; past compilation and warm-up.
        steps: how many are traced.
        memory: whether allocations are recorded, too.
        stacks: whether Python's call stacks are.
    """

    def __init__(self, first_step: int = 20, steps: int = 3, memory: bool = True, stacks: bool = False) -> None:
        for name, value, least in (("first_step", first_step, 0), ("steps", steps, 1)):
            if value < least:
                raise ValueError(f"Trace.{name}: {value} (expected {least} or more)")
        self.first_step, self.steps, self.memory, self.stacks = first_step, steps, memory, stacks
        self._profile: torch.profiler.profile | None = None
        self._begun = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        others = sum(isinstance(callback, Trace) for callback in trainer.callbacks) - 1
        if others or isinstance(trainer.profiler, PyTorchProfiler):  # torch's profiler crashes where two overlap
            found = f"{others + 1} of them" if others else "beside trainer.profiler: PyTorchProfiler"
            raise ConfigError(f"Trace: {found} (expected one trace a run); fix: leave one")
        begin = max(self.first_step, trainer.global_step)
        if begin + self.steps > trainer.max_steps:
            raise ConfigError(
                f"Trace.first_step: {self.first_step} and {self.steps} steps, but the run ends at {trainer.max_steps} "
                f"(it begins at {trainer.global_step}); fix: an earlier first_step, or a larger trainer.max_steps"
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None or self._begun or trainer.global_step < self.first_step:
            return
        self._begun = trainer.global_step + 1
        os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # no line on stderr for each start and stop
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if pl_module.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = torch.profiler.profile(
            activities=kinds, profile_memory=self.memory, with_stack=self.stacks, record_shapes=True
        )
        self._profile.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None and trainer.global_step >= self._begun + self.steps - 1:
            self._end(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._profile is not None:  # stopped early
            self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._profile is not None:
            self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        profile, self._profile = self._profile, None
        profile.stop()
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        path = folder / (f"trace-{rank}.json.gz" if rank else "trace.json.gz")
        if path.exists():  # of the run before it was resumed
            path = path.with_name(path.name.replace("trace", f"trace-from-{self._begun}"))
        profile.export_chrome_trace(str(path))
        last = min(self._begun + self.steps - 1, trainer.global_step)
        print(f"steps {self._begun} to {last} traced: {path} (open it in https://ui.perfetto.dev)", flush=True)
