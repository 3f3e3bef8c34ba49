"""What a step costs beside the model, in Python calls: the same number however busy the machine is.

And that every hook that somebody has written is called as Lightning calls it, in the same order, with the same arguments.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.trainer import call

from blagpt_pl.callbacks import hooks
from blagpt_pl.callbacks.hooks import EMPTY, OURS, STOCK
from blagpt_pl.callbacks.lean import Lean
from blagpt_pl.lab import null_run

CPU = torch.device("cpu")
MOST = 570  # Python calls a step with this project's default flags, log points included; 516 when this was written
HOOKS = [name for name in vars(L.Callback) if name.startswith("on_")]


def empty() -> None:
    """What an empty hook compiles to."""


def in_force() -> dict[str, Callable]:
    return {name: getattr(call, name) for name in STOCK}


class Logging(null_run.NullModel):
    """Logs its loss in each step, as is usual."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def test_a_step_costs_few_python_calls() -> None:
    assert null_run.calls_a_step(null_run.house, CPU) <= MOST


def test_the_limit_sees_one_self_log_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(null_run, "NullModel", Logging)
    assert null_run.calls_a_step(null_run.house, CPU) > MOST + 100


def test_the_limit_sees_the_usual_dispatch() -> None:
    assert null_run.calls_a_step(lambda *words: null_run.house(*words, lean=False), CPU) > 2 * MOST


# ---------------------------------------------------------------------- the hooks


class Journal:
    """Who was called, with what, and what `self.log` would take for the place it is called from."""

    def __init__(self) -> None:
        self.lines: list[tuple] = []

    def hook(self, who: str, name: str, base: Callable) -> Callable:
        def record(owner: Any, *args: Any, **kwargs: Any) -> Any:
            module = owner if isinstance(owner, L.LightningModule) else args[1]
            step = module.trainer.global_step if module._trainer is not None else None
            seen = [type(arg).__name__ for arg in args if not isinstance(arg, (Closure, FunctionType))]
            self.lines.append((who, name, step, module._current_fx_name, seen, sorted(kwargs)))
            return base(owner, *args, **kwargs)

        return record


def journaling(journal: Journal, who: str, base: type, names: list[str]) -> type:
    return type(who, (base,), {name: journal.hook(who, name, getattr(base, name)) for name in names})


class Batches:
    def __iter__(self) -> Iterator[null_run.Batch]:
        return iter(null_run.Meter(0, 100, CPU))


class Sized(Batches):
    def __iter__(self) -> Iterator[null_run.Batch]:
        batch = torch.zeros(1, 4, dtype=torch.int64)
        return iter([(batch, batch)] * 2)

    def __len__(self) -> int:
        return 2


class Measured(null_run.NullModel):
    def measure(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.ones((), dtype=torch.float64)


def trainer(*callbacks: L.Callback, **flags: Any) -> L.Trainer:
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    flags = {"max_steps": 5, **flags}
    return L.Trainer(
        max_epochs=-1, accelerator="cpu", devices=1, callbacks=list(callbacks), num_sanity_val_steps=0,
        val_check_interval=3, check_val_every_n_epoch=None, **off, **flags,
    )  # fmt: skip


def journal_of(lean: bool, folder: Path) -> list[tuple]:
    journal = Journal()
    of_module = [name for name in HOOKS if hasattr(L.LightningModule, name)]
    module = journaling(journal, "Module", Measured, [*of_module, "lr_scheduler_step", "optimizer_step"])()
    # one with all hooks, one with none, one whose hook is an attribute
    callbacks = [journaling(journal, "Callback", L.Callback, HOOKS)(), L.Callback(), L.Callback()]
    callbacks[2].on_train_batch_end = lambda *args: journal.lines.append(("attribute", args[1].trainer.global_step))
    with null_run.silence():
        run = trainer(*callbacks, *([Lean()] if lean else []), gradient_clip_val=1.0, default_root_dir=folder)
        run.fit(module, Batches(), Sized())
    return journal.lines


def test_all_hooks_are_called_as_lightning_calls_them(tmp_path: Path) -> None:
    ours, theirs = journal_of(True, tmp_path), journal_of(False, tmp_path)
    assert len(theirs) > 100
    assert ours == theirs


def test_a_missed_hook_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_call_callback_hooks"

    def forgetful(trainer: L.Trainer, hook_name: str, *args: Any, **kwargs: Any) -> None:
        if hook_name != "on_after_backward":
            OURS[name](trainer, hook_name, *args, **kwargs)

    monkeypatch.setattr(hooks, "OURS", {**OURS, name: forgetful})
    assert journal_of(True, tmp_path) != journal_of(False, tmp_path)


def test_a_hook_that_is_set_on_the_instance_counts_as_written() -> None:
    module, seen = null_run.NullModel(), []
    module.on_after_backward = lambda: seen.append("after backward")
    with null_run.silence():
        trainer(Lean()).fit(module, Batches())
    assert len(seen) == 5


def test_a_profiler_sees_every_call() -> None:
    seen = []
    for callbacks in ([], [Lean()]):
        profiler = SimpleProfiler()
        with null_run.silence():
            trainer(*callbacks, profiler=profiler).fit(null_run.NullModel(), Batches())
        seen.append({k: len(v) for k, v in profiler.recorded_durations.items() if "[Strategy]" in k or "Module]" in k})
    assert seen[0] == seen[1]
    assert seen[0]["[LightningModule]NullModel.on_before_backward"] == 5


def test_it_ends_with_the_training() -> None:
    class Inner(L.Callback):
        """Trains something else in the middle, and dies in the third step if told to."""

        def __init__(self, die: bool) -> None:
            self.die, self.during = die, []

        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                globals()["trainer"](Lean()).fit(null_run.NullModel(), Batches())
            self.during.append(in_force())
            if self.die and batch_idx == 3:
                raise RuntimeError("died")

    for die in (False, True):
        inner = Inner(die)
        run = trainer(Lean(), inner)
        with null_run.silence():
            if die:
                with pytest.raises(RuntimeError, match="died"):
                    run.fit(null_run.NullModel(), Batches())
            else:
                run.fit(null_run.NullModel(), Batches())
        assert all(functions == OURS for functions in inner.during)
        assert in_force() == STOCK
        assert "advance" not in vars(run.fit_loop.epoch_loop)


@pytest.mark.parametrize(("algorithm", "left"), [("norm", 0.75), ("value", 0.75), (None, 0.75)])
def test_gradients_are_clipped_once(algorithm: str | None, left: float) -> None:
    """The gradient of w² is 2 at w = 1; clipped to 0.25, a step of plain descent leaves 0.75."""
    module = null_run.NullModel()
    module.optimizer_factory = partial(torch.optim.SGD, lr=1.0)
    with null_run.silence():
        run = trainer(max_steps=1, gradient_clip_val=0.25, gradient_clip_algorithm=algorithm, log_every_n_steps=1)
        run.fit(module, Batches())
    assert module.weight.item() == pytest.approx(left, abs=1e-5)
    assert run.callback_metrics["grad_norm"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_fused_optimizers_are_clipped_under_autocast(algorithm: str) -> None:
    """Lightning's own clipping refuses them also where no scaler has scaled the gradients."""
    module = null_run.NullModel()
    module.optimizer_factory = partial(torch.optim.AdamW, fused=True)
    with null_run.silence():
        run = trainer(precision="bf16-mixed", gradient_clip_val=1.0, gradient_clip_algorithm=algorithm)
        run.fit(module, Batches())
    assert run.global_step == 5


# ---------------------------------------------------------------------- what is taken for granted of Lightning


@pytest.mark.parametrize("name", STOCK)
def test_lightning_has_the_functions_that_are_replaced(name: str) -> None:
    """Same parameters, and nothing in them but what is left out or done here: read them again if this fails."""
    ours, theirs = (list(inspect.signature(functions[name]).parameters) for functions in (OURS, STOCK))
    assert ours == theirs
    known = {
        "debug", "__name__", "__class__", "lightning_module", "_current_fx_name", "callbacks", "EarlyStopping",
        "Checkpoint", "isinstance", "getattr", "callable", "profiler", "profile", "state_key", "strategy", "TypeError", "log",
    }  # fmt: skip
    assert set(STOCK[name].__code__.co_names) <= known


@pytest.mark.parametrize("name", HOOKS)
def test_the_hooks_that_are_left_out_are_empty(name: str) -> None:
    assert getattr(L.Callback, name).__code__.co_code == empty.__code__.co_code
    if name in EMPTY:
        assert getattr(L.LightningModule, name).__code__.co_code == empty.__code__.co_code
