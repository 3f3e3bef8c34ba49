"""A resumed run is the uninterrupted one, bit for bit: losses, parameters and optimizer state, from every step.

The model has dropout, a step has two micro-batches, validation falls on some checkpoints and not on others, and the run
crosses two edges of the data's epochs.
"""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from helpers import block, tiny

from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO, read_checkpoint
from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.data.module import TokenData
from blagpt_pl.data.shards import write_shard
from blagpt_pl.data.sources import ShardFiles
from blagpt_pl.data.tokenizers import ByteTokenizer
from blagpt_pl.errors import CheckpointError
from blagpt_pl.optim.schedule import Trapezoid

STEPS, CONTEXT, BATCH = 14, 16, 4
WINDOWS = 23  # an epoch: 5.75 steps


class Watch(L.Callback):
    """Every step's exact loss, and every validation's, by step."""

    def __init__(self) -> None:
        self.train: dict[int, str] = {}
        self.val: dict[int, str] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.train[trainer.global_step] = float(outputs["loss"]).hex()

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        assert trainer.global_step not in self.val, "validated twice"
        self.val[trainer.global_step] = float(trainer.callback_metrics["val/loss"]).hex()


class KeepAll(Checkpoint):
    """Keeps a copy of each checkpoint under its step."""

    def save(self, trainer: L.Trainer) -> None:
        before = self.saved_step
        super().save(trainer)
        if self.saved_step != before:
            (self._folder / f"{trainer.global_step}.ckpt").write_bytes(self.last_path.read_bytes())


class StopAt(L.Callback):
    """Dies at the start of a step, as a killed process does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    write_shard(folder / "train_0.bin", rng.integers(0, 257, 200), 257)
    write_shard(folder / "train_1.bin", rng.integers(0, 257, WINDOWS * CONTEXT + 1 - 200), 257)
    write_shard(folder / "val_0.bin", rng.integers(0, 257, 400), 257)
    return folder


def make_data(folder: Path, **changes: Any) -> TokenData:
    source = ShardFiles([str(folder / "train_*.bin")], [str(folder / "val_*.bin")], ByteTokenizer())
    values = {"context": CONTEXT, "batch_size": BATCH, "device_batch_size": 2, "val_tokens": 301, "shuffle_seed": 5}
    return TokenData(source, **{**values, **changes})


def fit(
    folder: Path, out: Path, resume: Path | None = None, max_steps: int = STEPS, callbacks: tuple = (), **data: Any
) -> tuple[Watch, Any]:
    """One run; returns what was watched and the trained model."""
    torch.manual_seed(11)
    dropping = partial(block, dropout=0.1)
    model = tiny(
        vocab_size=257,
        context=CONTEXT,
        block=dropping(),
        dropout=0.1,
        schedule=partial(Trapezoid, warmup=3, warmdown=4),
    )
    if max_steps != STEPS:
        model.schedule_factory = lambda steps: Trapezoid(STEPS, 3, 4)  # the run's own schedule, whatever its length
    watch = Watch()
    trainer = L.Trainer(
        max_epochs=-1, max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        use_distributed_sampler=False, gradient_clip_val=1.0, log_every_n_steps=4, default_root_dir=out,
        callbacks=[watch, KeepAll(every_n_steps=1), *callbacks], plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(model, make_data(folder, **data), ckpt_path=resume, weights_only=True)
    return watch, model


@pytest.fixture(scope="module")
def whole(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Watch, Any, Path]:
    """The uninterrupted run, with a checkpoint of every step."""
    out = tmp_path_factory.mktemp("whole")
    return *fit(data_folder, out), out / "checkpoints"


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_the_run_learns_and_validates_at_the_end(whole: tuple) -> None:
    watch, _, _ = whole
    assert sorted(watch.train) == list(range(1, STEPS + 1))
    assert sorted(watch.val) == [3, 6, 9, 12, STEPS]  # every third step, and the last


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resume_from_every_step_is_bit_exact(whole: tuple, data_folder: Path, tmp_path: Path, step: int) -> None:
    watch, model, checkpoints = whole
    again, resumed = fit(data_folder, tmp_path, resume=checkpoints / f"{step}.ckpt")
    assert again.train == {k: v for k, v in watch.train.items() if k > step}
    assert again.val == {k: v for k, v in watch.val.items() if k > step}
    assert same(model.state_dict(), resumed.state_dict())
    first, second = (read_checkpoint(f / f"{STEPS}.ckpt") for f in (checkpoints, tmp_path / "checkpoints"))
    assert same(first["optimizer_states"], second["optimizer_states"])
    assert same(first["lr_schedulers"], second["lr_schedulers"])
    assert same(first["loops"]["fit_loop"], second["loops"]["fit_loop"])


def test_three_crashes_in_a_row_change_nothing(whole: tuple, data_folder: Path, tmp_path: Path) -> None:
    watch, model, _ = whole
    resume = None
    for stop in (4, 5, 11):
        with pytest.raises(RuntimeError, match="killed"):
            fit(data_folder, tmp_path / str(stop), resume=resume, callbacks=(StopAt(stop),))
        resume = tmp_path / str(stop) / "checkpoints" / "last.ckpt"
        assert read_checkpoint(resume)["global_step"] == stop - 1
    again, resumed = fit(data_folder, tmp_path / "end", resume=resume)
    assert again.train == {k: v for k, v in watch.train.items() if k > 10}
    assert same(model.state_dict(), resumed.state_dict())


def test_a_longer_run_goes_on_from_a_finished_one(whole: tuple, data_folder: Path, tmp_path: Path) -> None:
    watch, model, _ = whole
    _, _ = fit(data_folder, tmp_path / "a", max_steps=8)
    again, resumed = fit(data_folder, tmp_path / "b", resume=tmp_path / "a" / "checkpoints" / "last.ckpt")
    assert again.train == {k: v for k, v in watch.train.items() if k > 8}
    assert same(model.state_dict(), resumed.state_dict())


def test_every_checkpoint_is_plain_data_at_a_step_boundary(whole: tuple) -> None:
    _, _, checkpoints = whole
    for step in range(1, STEPS + 1):
        content = torch.load(checkpoints / f"{step}.ckpt", weights_only=True)
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        assert set(progress.values()) == {step} == {content["position"]["step"]}


def test_other_data_is_refused(whole: tuple, data_folder: Path, tmp_path: Path) -> None:
    _, _, checkpoints = whole
    with pytest.raises(CheckpointError, match=r"data.batch_size: 8 \(expected 4"):
        fit(data_folder, tmp_path, resume=checkpoints / "4.ckpt", batch_size=8)


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(whole: tuple) -> None:
    watch, _, checkpoints = whole
    best = min(watch.val, key=lambda step: float.fromhex(watch.val[step]))
    assert read_checkpoint(checkpoints / "best.ckpt")["global_step"] == best
    assert read_checkpoint(checkpoints / "last.ckpt")["global_step"] == STEPS
