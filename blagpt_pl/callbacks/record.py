"""The record of a run: status.json while it lasts, result.json and a line in results.jsonl when it ends, a summary to read.

Seed, resolved configuration, data fingerprint, code version and hardware stand beside every number.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Timer

from blagpt_pl import __version__
from blagpt_pl.callbacks.atomic_io import write_atomically
from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.callbacks.first_step import FirstStep
from blagpt_pl.callbacks.step_time import StepTime
from blagpt_pl.callbacks.summary import summary
from blagpt_pl.callbacks.unigram import Unigram
from blagpt_pl.callbacks.vram import PeakVRAM, peak_ram_mib
from blagpt_pl.errors import Diverged
from blagpt_pl.nn.attention.backends import kernels
from blagpt_pl.nn.autocast import autocast_dtype
from blagpt_pl.nn.base import Core, SequenceMixer, count
from blagpt_pl.optim.account import groups_told, state_bytes


def code_version() -> str:
    """The package's version, and the commit it was run from where that is known."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False, timeout=10)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        dirty = "-dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    except (OSError, subprocess.TimeoutExpired):
        commit = dirty = ""
    return f"{__version__}+{commit}{dirty}" if commit else __version__


def hardware(device: torch.device, ranks: int) -> str:
    """What the run ran on: `8 x NVIDIA H200`, or the processor and its number of threads."""
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{ranks} x CPU ({name}, {threads} thread{'s' if threads > 1 else ''})"


def by_kernels(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
    """What attention and recurrences run by, under the run's precision; "" where a model has none of them."""
    with trainer.precision_plugin.train_step_context():
        dtype = autocast_dtype(pl_module.device) or next(pl_module.parameters()).dtype
    at = (pl_module.device, dtype, getattr(pl_module, "context", 1))
    kinds = {"attention": Core, "recurrence": SequenceMixer}
    return {name: kernels(pl_module, kind, *at) for name, kind in kinds.items()}


def _find(trainer: L.Trainer, kind: type) -> Any:
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


class Record(L.Callback):
    """Writes what a run was and what came of it.

    Args:
        config: the resolved configuration, as text; it travels in every checkpoint.
    """

    def __init__(self, config: str) -> None:
        self.config = config
        self._folder: Path | None = None
        self._started = 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:
            self._folder = Path(trainer.log_dir)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.time()
        self._status(trainer, "running")
        if self._folder is not None and trainer.is_global_zero:
            size = f"{count(pl_module.parameters()) / 1e6:,.2f} M parameters"
            length = f"{trainer.max_steps:,} steps of {getattr(trainer.datamodule, 'tokens_per_step', 0):,} tokens"
            where = hardware(pl_module.device, trainer.world_size)
            by = "".join(f", {name} by {kernel}" for name, kernel in by_kernels(trainer, pl_module).items() if kernel)
            print(f"{self._folder}: {type(pl_module).__name__}, {size}, {length}, {where}{by}", flush=True)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._started:
            asked = isinstance(exception, SystemExit | KeyboardInterrupt)
            state = "stopped" if asked else "diverged" if isinstance(exception, Diverged) else "failed"
            self._end(trainer, pl_module, state)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        out_of_time = any((timer.time_remaining() or 1) <= 0 for timer in trainer.callbacks if isinstance(timer, Timer))
        self._end(trainer, pl_module, "stopped" if out_of_time else "finished")

    def _status(self, trainer: L.Trainer, state: str) -> None:
        if self._folder is not None and trainer.is_global_zero:
            self._write("status.json", json.dumps({"state": state, "step": trainer.global_step, "pid": os.getpid()}))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self._folder / name, lambda file: file.write(text.encode()))

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule, state: str) -> None:
        if self._folder is None or not trainer.is_global_zero:
            return
        result = self.collect(trainer, pl_module, state)
        self._write("result.json", json.dumps(result, indent=2))
        with (self._folder.parent.parent / "results.jsonl").open("a") as ledger:
            ledger.write(json.dumps(result) + "\n")
        self._status(trainer, state)
        print(summary(result))

    def collect(self, trainer: L.Trainer, pl_module: L.LightningModule, state: str) -> dict[str, Any]:
        """Everything that result.json holds."""
        logged = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if (yardstick := _find(trainer, Unigram)) is not None:
            logged |= yardstick.metrics
        finite = {name: float(value) for name, value in logged.items() if math.isfinite(float(value))}
        metrics = {name.replace("/", "_"): _rounded(value) for name, value in finite.items()}
        metrics["val_tokens"] = int(metrics.get("val_tokens", 0))
        steps, first, memory, saved = (_find(trainer, kind) for kind in (StepTime, FirstStep, PeakVRAM, Checkpoint))
        data = trainer.datamodule
        result = {
            "state": state,
            "run": str(self._folder),
            **metrics,
            "steps": trainer.global_step,
            "max_steps": trainer.max_steps,
            "tokens": trainer.global_step * getattr(data, "tokens_per_step", 0),
            "parameters": count(pl_module.parameters()),
            "seconds": _rounded(time.time() - self._started if self._started else 0.0),  # nothing was left to train
            "seed": pl_module.seed,
        }
        if saved is not None and saved.best_step:
            result |= {"best_val_loss": _rounded(saved.best), "best_step": saved.best_step}
        if steps is not None:
            result |= {k: _rounded(v) for k, v in steps.summary().items()}
        if first is not None:
            result |= {k: _rounded(v) if isinstance(v, float) else v for k, v in first.summary().items()}
        if memory is not None:
            result |= {
                "peak_vram_train_mib": _rounded(memory.train_mib),
                "peak_vram_eval_mib": _rounded(memory.eval_mib),
            }
        if trainer.optimizers:
            (optimizer,) = trainer.optimizers
            result |= {
                "optimizer": type(optimizer).__name__,
                "optimizer_state_mib": _rounded(state_bytes(optimizer) / 2**20),
                "groups": groups_told(optimizer),
            }
        return result | {
            "peak_ram_mib": _rounded(peak_ram_mib()),
            "hardware": hardware(pl_module.device, trainer.world_size),
            **by_kernels(trainer, pl_module),
            "ranks": trainer.world_size,
            "precision": str(trainer.precision),
            "code": code_version(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
            "config_sha256": hashlib.sha256(self.config.encode()).hexdigest()[:16],
            "data": data.state_dict() if data is not None else {},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
