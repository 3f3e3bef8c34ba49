"""A model that computes next to nothing, in a bare loop and in Trainers: what is left is the price of a step.

Clock      of the process's CPU time, from the moment at which one batch is asked for to that of a later one, so that starting
           a Trainer does not count, and other processes count little
Calls      of Python functions in between, by `sys.setprofile`: the same number however busy the machine is
Busy       a step may keep the host busy for some CPU time, which hides nothing as work on a device would, and after which the
           caches are cold; that time itself is taken out of the measurement, because it varies more than what is looked for
"""

import contextlib
import io
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn

from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO
from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.callbacks.lean import Lean
from blagpt_pl.callbacks.progress import Progress
from blagpt_pl.callbacks.run_logger import RunLogger
from blagpt_pl.callbacks.samples import Samples
from blagpt_pl.callbacks.step_time import StepTime
from blagpt_pl.lab.train import DEFAULTS, house_callbacks
from blagpt_pl.lm import LanguageModel
from blagpt_pl.optim.schedule import Constant

Batch = tuple[Tensor, Tensor]


class Meter:
    """Endless batches that measure from the batch number `first` to `steps` later.

    Args:
        first: batches before.
        steps: batches measured.
        device: where they are.
        busy_ms: what each step's objective takes of the host's CPU time, in `keep_busy`.
        counting: count Python calls, which takes time.

    Attributes:
        cpu_ms: of a step, beside `keep_busy`.
        calls: Python calls of a step, if they were to be counted.
    """

    def __init__(
        self, first: int, steps: int, device: torch.device, busy_ms: float = 0.0, counting: bool = False
    ) -> None:
        self.first, self.steps, self.busy_ms, self.counting = first, steps, busy_ms, counting
        self.batch = torch.zeros(2, 1, 1, 4, dtype=torch.int64, device=device).unbind()  # inputs, targets (A, B, T)
        self.cpu_ms = self.calls = self._busy_s = 0.0

    @property
    def last(self) -> int:
        """Steps that a run must take for the measurement to end; a Trainer fetches one batch ahead."""
        return self.first + self.steps + 1

    def keep_busy(self) -> None:
        """Use up CPU time."""
        if self.busy_ms:
            start = now = time.thread_time()
            while now - start < self.busy_ms / 1e3:
                now = time.thread_time()
            self._busy_s += now - start

    def __iter__(self) -> Iterator[Batch]:
        yield from itertools.repeat(self.batch, self.first)
        n = 0

        def count(frame: FrameType, event: str, arg: object) -> None:
            nonlocal n
            n += event == "call"

        if self.counting:
            sys.setprofile(count)
        start, self._busy_s = time.process_time(), 0.0
        yield from itertools.repeat(self.batch, self.steps)
        self.cpu_ms = 1e3 * (time.process_time() - start - self._busy_s) / self.steps
        if self.counting:
            sys.setprofile(None)
        self.calls = n / self.steps
        yield from itertools.repeat(self.batch)


class NullModel(LanguageModel):
    """One weight; trained by everything that trains a model here.

    Args:
        busy: what the objective does besides.
    """

    def __init__(self, busy: Callable[[], None] | None = None) -> None:
        super().__init__(8, 4, torch.optim.AdamW, Constant)
        self.weight = nn.Parameter(torch.ones(()))
        self.busy = busy

    def regions(self) -> Iterable[nn.Module]:
        return ()

    def parameter_roles(self) -> dict[str, str]:
        return {"weight": "vector"}

    def flops_per_token(self) -> None:
        """Not counted: there is no model to speak of."""

    def objective(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.weight * self.weight
        if self.busy is not None:
            self.busy()
        return loss, {"loss": loss}


class StockModel(L.LightningModule):
    """The same weight in the usual LightningModule, which logs its loss to the bar in each step."""

    def __init__(self, busy: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.busy = busy

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.weight * self.weight
        if self.busy is not None:
            self.busy()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Constant(1).on(optimizer), "interval": "step"}}


def bare(meter: Meter, device: torch.device) -> None:
    """The loop that one would write by hand."""
    model = NullModel(meter.keep_busy).to(device)
    optimizer = model.make_optimizer()
    scheduler = Constant(meter.last).on(optimizer)
    for (tokens,), (targets,) in itertools.islice(meter, meter.last):
        optimizer.zero_grad()
        loss, _ = model.objective(tokens, targets)
        loss.backward()
        optimizer.step()
        scheduler.step()


@contextlib.contextmanager
def silence() -> Iterator[Path]:
    """Nothing is printed; a folder for what is written, which goes afterwards."""
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels, nowhere = [log.level for log in loggers], io.StringIO()
    with (
        tempfile.TemporaryDirectory(prefix="blagpt-null-") as folder,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for log in loggers:
                log.setLevel(logging.ERROR)
            yield Path(folder)
        finally:
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def _where(device: torch.device) -> dict:
    devices = 1 if device.type == "cpu" else [device.index or 0]
    return {"accelerator": device.type, "devices": devices, "plugins": [LightningEnvironment()]}


def house_trainer(folder: Path, steps: int, device: torch.device, *more: L.Callback, lean: bool = True) -> L.Trainer:
    """The Trainer of `blagpt fit`: its flags, callbacks, logger and plugin.

    Args:
        folder: of the run.
        steps: length of the run.
        device: where it runs.
        more: callbacks beside the house's.
        lean: whether `Lean` is among the callbacks.
    """
    callbacks = [*house_callbacks("null: true", Checkpoint(), Samples(), StepTime()), Progress(), *more]
    flags = _where(device)
    flags["plugins"].append(AtomicCheckpointIO())
    return L.Trainer(
        max_steps=steps, callbacks=[c for c in callbacks if lean or not isinstance(c, Lean)],
        logger=[RunLogger(folder / "null" / "0", "null: true")], **DEFAULTS, **flags,
    )  # fmt: skip


def house(meter: Meter, device: torch.device, lean: bool = True) -> None:
    """`blagpt fit`, as far as it is a Trainer."""
    with silence() as folder:
        house_trainer(folder, meter.last, device, lean=lean).fit(NullModel(meter.keep_busy), meter)


def alone(meter: Meter, device: torch.device) -> None:
    """Lightning's Trainer around our module, with all that can be switched off switched off."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    with silence():
        L.Trainer(max_steps=meter.last, **DEFAULTS, **off, **_where(device)).fit(NullModel(meter.keep_busy), meter)


def stock(meter: Meter, device: torch.device) -> None:
    """Lightning's Trainer with its own defaults around its usual module."""
    with silence() as folder:
        flags = _where(device)
        L.Trainer(max_steps=meter.last, max_epochs=-1, default_root_dir=folder, **flags).fit(
            StockModel(meter.keep_busy), meter
        )


RUNS: dict[str, Callable[..., None]] = {
    "bare loop": bare,
    "blagpt fit, default flags": house,
    "blagpt fit, Lightning's own step": lambda *words: house(*words, lean=False),
    "Lightning's Trainer around our module, all switched off": alone,
    "Lightning, default flags, self.log(prog_bar=True)": stock,
}


def calls_a_step(run: Callable[..., None], device: torch.device, steps: int = 100) -> float:
    """Python calls of a step, log points included."""
    meter = Meter(20, steps, device, counting=True)
    run(meter, device)
    return meter.calls


def cpu_ms(run: Callable[..., None], device: torch.device, steps: int, busy_ms: float = 0.0) -> float:
    """CPU time of a step, beside `busy_ms` of the objective."""
    run(meter := Meter(10, steps, device, busy_ms), device)
    return meter.cpu_ms
