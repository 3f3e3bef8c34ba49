"""Every shipped optimizer in a real run: accumulated, clipped, in bf16-mixed, saved at every step and taken up again."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from overlays import NAMES, SURE, bytes_of_text, model
from torch import Tensor

from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO, read_checkpoint
from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.data.module import TokenData
from blagpt_pl.data.shards import write_shard
from blagpt_pl.data.sources import ShardFiles
from blagpt_pl.data.tokenizers import ByteTokenizer
from blagpt_pl.lab.train import DEFAULTS
from blagpt_pl.optim.schedule import Trapezoid

STEPS = 5


class KeepAll(Checkpoint):
    """Keeps a copy of each checkpoint under its step."""

    def save(self, trainer: L.Trainer) -> None:
        before = self.saved_step
        super().save(trainer)
        if self.saved_step != before:
            (self._folder / f"{trainer.global_step}.ckpt").write_bytes(self.last_path.read_bytes())


class Losses(L.Callback):
    """What each step came to."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(outputs["loss"]))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text = bytes_of_text().numpy().astype(np.uint16)
    write_shard(folder / "train_0.bin", text[:20_000], 257)
    write_shard(folder / "val_0.bin", text[20_000:20_400], 257)
    return folder


def fit(
    name: str, shards: Path, out: Path, rows: int, resume: Path | None = None, words: tuple = (), **flags: Any
) -> tuple[list[float], dict[str, Tensor], list]:
    """A run of a few steps of 8 windows, `rows` at a time: losses, weights, the optimizer's state."""
    torch.manual_seed(0)
    lm = model(name, *words, vocab_size=257, context=32, schedule=lambda steps: Trapezoid(STEPS, 2, 2))
    source = ShardFiles([str(shards / "train_*.bin")], [str(shards / "val_*.bin")], ByteTokenizer())
    data = TokenData(source, context=32, batch_size=8, device_batch_size=rows, val_tokens=100)
    losses = Losses()
    flags = {**DEFAULTS, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, **flags}
    trainer = L.Trainer(
        max_steps=STEPS, limit_val_batches=0, default_root_dir=out, plugins=[AtomicCheckpointIO()],
        callbacks=[losses, KeepAll(every_n_steps=1)], **flags,
    )  # fmt: skip
    trainer.fit(lm, data, ckpt_path=resume, weights_only=True)
    state = read_checkpoint(out / "checkpoints" / f"{STEPS}.ckpt")["optimizer_states"]
    return losses.seen, {n: p.detach().clone() for n, p in lm.named_parameters()}, state


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_clipped_mixed_and_resumed(name: str, shards: Path, tmp_path: Path) -> None:
    """Four micro-batches a step under bf16-mixed, gradients clipped hard; from step 2 again to the same bits."""
    flags = {"precision": "bf16-mixed", "gradient_clip_val": 0.05}
    losses, weights, state = fit(name, shards, tmp_path / "whole", 2, **flags)
    assert len(losses) == STEPS and all(np.isfinite(losses))
    assert all(p.isfinite().all() for p in weights.values())
    again = fit(name, shards, tmp_path / "again", 2, tmp_path / "whole/checkpoints/2.ckpt", **flags)
    assert again[0] == losses[2:]
    assert same(again[1], weights)
    assert same(again[2], state)


@pytest.mark.parametrize("name", NAMES)
def test_four_micro_batches_are_one_batch(name: str, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = {n: p.detach() for n, p in model(name, vocab_size=257, context=32).named_parameters()}
    words = SURE.get(name, ())
    one = fit(name, shards, tmp_path / "one", 8, words=words, gradient_clip_val=0.05)
    four = fit(name, shards, tmp_path / "four", 2, words=words, gradient_clip_val=0.05)
    moved = max(float((p - start[n]).abs().max()) for n, p in one[1].items())
    apart = [float((p - four[1][n]).abs().mean()) for n, p in one[1].items()]
    assert moved > 1e-5
    assert max(apart) < 1e-2 * moved  # a sum in another order flips a sign here and there, where a step is all sign
