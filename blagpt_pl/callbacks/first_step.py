"""How long the first step took, and what was compiled in it.

A first step includes compilation. What torch's compiler did since training began is read from its own counters: the graphs
that it traced, and how many of them Inductor found in its cache on disk instead of generating code.
"""

import time
from typing import Any

import lightning as L
import torch


class FirstStep(L.Callback):
    """Measures the first step of a session, until the device has finished it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: float | None = None
        self._before: dict[str, int] = {}
        self._compiled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._before, self._compiled = counted(), pl_module.backend is not None
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:
            return
        if pl_module.device.type != "cpu":
            torch.accelerator.synchronize(pl_module.device)
        self.seconds, self._started = time.perf_counter() - self._started, None
        pl_module.report({"perf/first_step_s": self.seconds})

    def summary(self) -> dict[str, float]:
        """`first_step_s`; of a compiled model also what `counted` counts, since training began."""
        if not self.seconds:
            return {}
        found = {"first_step_s": self.seconds}
        if self._compiled:
            found |= {name: n - self._before[name] for name, n in counted().items()}
        return found


def counted() -> dict[str, int]:
    """Graphs traced in this process; pieces whose code Inductor found on disk, and made (forward and backward count apart)."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "kernels_cached": counters["inductor"]["fxgraph_cache_hit"],
        "kernels_compiled": counters["inductor"]["fxgraph_cache_miss"],
    }
