"""A trace is of the steps that were asked for, in the run's folder, and of them alone."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from helpers import tiny
from lightning.pytorch.profilers import PyTorchProfiler

from blagpt_pl.callbacks.trace import Trace
from blagpt_pl.errors import ConfigError

CONTEXT = 16


class Batches:
    """Endless batches of one micro-batch; Lightning asks it as it asks `TrainBatches`."""

    def __iter__(self) -> object:
        while True:
            yield torch.zeros(2, 1, 2, CONTEXT, dtype=torch.int64).unbind()


class Killed(L.Callback):
    """Dies at the end of a step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("killed")


def fit(folder: Path, trace: Trace, *callbacks: L.Callback, steps: int = 8) -> None:
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[trace, *callbacks], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(tiny(context=CONTEXT), Batches())


def steps_in(path: Path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(str(event.get("name", "")).startswith("Optimizer.step") for event in events)


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (2, 3), (5, 3)])
def test_it_holds_the_steps_that_were_asked_for(first: int, steps: int, tmp_path: Path, capsys: object) -> None:
    fit(tmp_path / "run", Trace(first, steps, memory=False))
    assert steps_in(tmp_path / "run" / "trace.json.gz") == steps
    assert (
        f"steps {first + 1} to {first + steps} traced: {tmp_path / 'run' / 'trace.json.gz'}" in capsys.readouterr().out
    )


def test_a_run_that_dies_leaves_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, Trace(3, 4, memory=False), Killed())
    assert steps_in(tmp_path / "trace.json.gz") == 2


def test_a_run_that_ends_before_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Trace.first_step: 6 and 3 steps, but the run ends at 8"):
        fit(tmp_path, Trace(6, 3))


class Enough(L.Callback):
    """Ends the run at the end of a step, in order."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step == 5


def test_a_run_that_is_stopped_early_leaves_what_it_has(tmp_path: Path, capsys: object) -> None:
    fit(tmp_path, Trace(3, 4, memory=False), Enough())
    assert steps_in(tmp_path / "trace.json.gz") == 2
    assert "steps 4 to 5 traced" in capsys.readouterr().out


def test_two_traces_at_once_are_refused(tmp_path: Path) -> None:
    """torch's profiler knows one at a time: two that overlap crash the process, two that do not share a file."""
    with pytest.raises(ConfigError, match="Trace: 2 of them"):
        fit(tmp_path, Trace(1, 2), Trace(4, 2))
    trace = Trace(1, 2)
    trainer = SimpleNamespace(callbacks=[trace], profiler=PyTorchProfiler(dirpath=tmp_path), global_step=0, max_steps=8)
    with pytest.raises(ConfigError, match="Trace: beside trainer.profiler"):
        trace.on_train_start(trainer, None)


@pytest.mark.parametrize(("name", "value"), [("first_step", -1), ("steps", 0)])
def test_a_value_that_makes_no_sense_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"Trace.{name}: {value}"):
        Trace(**{name: value})
