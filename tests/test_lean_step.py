"""The lean step against Lightning's own: whatever a module may do, weights, counters, metrics and batches are the same."""

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn

from blagpt_pl.callbacks.lean import Lean
from blagpt_pl.callbacks.lean_step import LeanStep
from blagpt_pl.lab import null_run


class Regression(L.LightningModule):
    """The usual module, of somebody who has never heard of ours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(3, 1)
        self.seen: list[Any] = []

    def loss(self, batch: Tensor) -> Tensor:
        return (self.map(batch) - batch.sum(-1, keepdim=True)).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.seen.append((batch_idx, float(batch.double().sum())))
        return self.loss(batch)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        self.seen.append({name: float(value) for name, value in (outputs or {}).items()})

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Logging(Regression):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("step", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss


class LoggingLate(Regression):
    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if batch_idx == 2:
            self.log("late", outputs["loss"])


class ReturningMore(Regression):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        return {"loss": super().training_step(batch, batch_idx), "norm": batch.norm()}


class SkippingSteps(Regression):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class EndingEpochs(Regression):
    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


class WithoutIndex(Regression):
    def training_step(self, batch: Tensor) -> Tensor:
        return super().training_step(batch, 7)


class FromIterator(Regression):
    def training_step(self, dataloader_iter: Iterator) -> Tensor:
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


class Manual(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Searching(Regression):
    """LBFGS asks for the loss several times a step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=3)


class EveryStep(Regression):
    def configure_optimizers(self) -> dict:
        config = super().configure_optimizers()
        return {**config, "lr_scheduler": {"scheduler": config["lr_scheduler"], "interval": "step", "frequency": 2}}


class Plateau(Logging):
    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "step_step", "interval": "step"},
        }


class Stepping(Regression):
    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any] | None = None
    ) -> None:
        self.seen.append(float(optimizer.step(closure=closure)))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append("zero")
        optimizer.zero_grad(set_to_none=False)


class Moving(Regression):
    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch * 2

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        return super().transfer_batch_to_device(batch + 1, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch / 3


class Data(L.LightningDataModule):
    """Moves batches its own way, also where the module has one."""

    def train_dataloader(self) -> "Batches":
        return Batches()

    def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch + 0.5

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        return batch * 0.5


class Batches:
    """Four batches, the third of which may be None."""

    def __init__(self, hole: bool = False) -> None:
        self.hole = hole

    def __iter__(self) -> Iterator[Tensor | None]:
        made = list(torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1)))
        return iter([*made[:2], None, *made[3:]] if self.hole else made)

    def __len__(self) -> int:
        return 4


class Endless(Batches):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield from super().__iter__()

    __len__ = None


class Beside(L.Callback):
    """Looks at what the loop has counted whenever it is asked."""

    def __init__(self) -> None:
        self.counts: list[Any] = []

    def count(self, trainer: L.Trainer, *_: Any) -> None:
        self.counts.append(copy.deepcopy(trainer.fit_loop.state_dict()))

    on_train_batch_start = on_before_zero_grad = on_before_optimizer_step = on_train_batch_end = count


def run(lean: bool, module: type[Regression], folder: Path, data: Any = None, **flags: Any) -> tuple:
    """Everything that can be seen of a run afterwards, and whether its steps were lean ones."""
    beside, model = Beside(), module()
    taken = []

    class Looking(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            taken.append("advance" in vars(trainer.fit_loop.epoch_loop))

    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    flags = {"max_epochs": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **off, **flags}
    callbacks = [beside, *([Lean(), Looking()] if lean else [])]
    with null_run.silence():
        trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=callbacks, default_root_dir=folder, **flags)
        trainer.fit(model, Batches() if data is None else data, None if isinstance(data, Data) else Batches())
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    metrics = {name: float(value) for name, value in {**trainer.callback_metrics, **trainer.logged_metrics}.items()}
    bar = {name: float(value) for name, value in trainer.progress_bar_metrics.items()}
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    loops = trainer.fit_loop.state_dict()
    return (state, metrics, bar, rates, loops, trainer.global_step, model.seen, beside.counts), any(taken)


USUAL = [
    (Regression, {}), (Logging, {}), (LoggingLate, {}), (ReturningMore, {}), (SkippingSteps, {}), (EndingEpochs, {}),
    (WithoutIndex, {}), (Searching, {}), (EveryStep, {}), (Stepping, {}), (Moving, {}),
    (Regression, {"data": Batches(hole=True)}), (Regression, {"data": Endless(), "max_steps": 9}),
    (Moving, {"data": Data()}), (Regression, {"data": Data()}),
    (Regression, {"gradient_clip_val": 0.1}), (Regression, {"precision": "bf16-mixed"}),
    (Regression, {"precision": "bf16-true"}), (Logging, {"val_check_interval": 2}), (Logging, {"limit_train_batches": 3}),
    (Regression, {"max_steps": 5}), (Regression, {"fast_dev_run": 2}),
]  # fmt: skip
OTHERS = [(Manual, {}), (Plateau, {}), (Regression, {"profiler": "simple"})]
GIVEN_BACK = [(Regression, {"accumulate_grad_batches": 3}), (FromIterator, {})]  # step by step


def case(one: tuple[type, dict]) -> str:
    return "-".join([one[0].__name__, *(f"{k}={v if isinstance(v, int | str) else type(v).__name__}" for k, v in one[1].items())])  # fmt: skip


@pytest.mark.parametrize("one", [*USUAL, *OTHERS, *GIVEN_BACK], ids=case)
def test_a_run_is_what_it_is_without(one: tuple[type[Regression], dict], tmp_path: Path) -> None:
    module, flags = one
    theirs, _ = run(False, module, tmp_path, **flags)
    ours, lean = run(True, module, tmp_path, **flags)
    assert ours == theirs
    assert lean == (one not in OTHERS)


def test_also_with_scaled_gradients(tmp_path: Path) -> None:
    def scaled() -> dict[str, Any]:
        from lightning.pytorch.plugins import MixedPrecision

        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}

    theirs, _ = run(False, Regression, tmp_path, **scaled())
    ours, lean = run(True, Regression, tmp_path, **scaled())
    assert lean
    assert ours == theirs


class Looking(Batches):
    """Batches that write down which hook a module seems to be in whenever one is asked for."""

    def __init__(self, module: L.LightningModule, names: list) -> None:
        super().__init__()
        self.module, self.names = module, names

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            self.names.append(self.module._current_fx_name)
            yield batch


def test_between_hooks_nobody_is_named() -> None:
    """`self.log` outside of a hook is an error of Lightning's; so no hook may leave its name behind."""
    seen: dict[bool, list] = {}
    for lean in (True, False):
        module, seen[lean] = Stepping(), []
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        with null_run.silence():
            callbacks = [Beside(), *([Lean()] if lean else [])]
            trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=2, callbacks=callbacks, **off)
            trainer.fit(module, Looking(module, seen[lean]))
    assert len(seen[True]) == 8
    assert seen[True] == seen[False]
    assert "on_train_batch_end" not in seen[True]


def test_the_comparison_sees_a_step_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: LeanStep, progress: Any) -> None:
        self.loop._results.batch = None

    monkeypatch.setattr(LeanStep, "_close", forgetful)
    assert run(True, Regression, tmp_path)[0] != run(False, Regression, tmp_path)[0]


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    """From a checkpoint in the middle of an epoch, on either side of the two."""

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    class Counted(Batches):
        """Batches that say where they are."""

        at = 0

        def __iter__(self) -> Iterator[Tensor]:
            for batch in list(super().__iter__())[self.at :]:
                self.at = (self.at + 1) % 4
                yield batch

        def state_dict(self) -> dict[str, int]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    ends = []
    for first in (True, False):
        with null_run.silence():
            flags = {
                "max_epochs": 3,
                "accelerator": "cpu",
                "devices": 1,
                "logger": False,
                "enable_progress_bar": False,
                "enable_checkpointing": False,
            }
            trainer = L.Trainer(callbacks=[Saving(), *([Lean()] if first else [])], max_steps=6, **flags)
            trainer.fit(Logging(), Counted())
            for second in (True, False):
                model = Logging()
                trainer = L.Trainer(callbacks=[Lean()] if second else [], **flags)
                trainer.fit(model, Counted(), ckpt_path=tmp_path / "6.ckpt", weights_only=False)
                ends.append((model.map.weight.tolist(), trainer.fit_loop.state_dict(), model.seen))
    assert all(end == ends[0] for end in ends)
    assert ends[0][1]["epoch_progress"]["total"]["completed"] == 3


# ---------------------------------------------------------------------- what is taken for granted of Lightning


def test_the_loops_own_step_is_the_one_that_was_read() -> None:
    """All names in it; read it again if one has come or gone."""
    known = {
        "restarting", "_should_check_val_fx", "val_loop", "restarted_mid_evaluation", "restarted_on_last", "_skip_next_val",
        "increment_progress_to_evaluation_end", "torch", "distributed", "is_available", "is_initialized", "trainer",
        "world_size", "_broadcast_sigterm_tensor", "isinstance", "_DataLoaderIterDataFetcher", "next", "_batch",
        "_batch_idx", "batch_idx", "done", "batch_progress", "is_last_batch", "precision_plugin", "convert_input",
        "lightning_module", "_on_before_batch_transfer", "call", "_call_strategy_hook", "increment_ready",
        "_logger_connector", "on_batch_start", "_warning_cache", "warn", "_call_callback_hooks",
        "_call_lightning_module_hook", "increment_by", "increment_started", "_build_kwargs", "OrderedDict", "profiler",
        "profile", "automatic_optimization", "run", "optimizers", "manual_optimization", "increment_processed",
        "update_lr_schedulers", "_num_ready_batches_reached", "StopIteration", "on_batch_end", "increment_completed",
        "update_train_step_metrics",
    }  # fmt: skip
    assert set(_TrainingEpochLoop.advance.__code__.co_names) == known


@pytest.mark.parametrize("name", ["on_before_batch_transfer", "on_after_batch_transfer"])
def test_the_hooks_of_a_batch_that_are_left_out_return_it(name: str) -> None:
    source = inspect.getsource(getattr(DataHooks, name))
    assert source.rstrip().endswith('"""\n        return batch')
