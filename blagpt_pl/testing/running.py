"""Short, quiet runs of a model in a real Trainer, on the CPU: what the promises of training are read off.

Quiet    no logger, checkpoints, bar, summary, banner or warning, and no file; the global generators are given back as they were
Cost     about 15 ms a run besides its steps
"""

import copy
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor

LENGTH = 32  # tokens of a sequence, or the model's context where that is shorter

Batch = tuple[Tensor, Tensor]  # inputs and targets (A, B, T): the micro-batches of one step


class Steps:
    """Batches without a known number: a run ends with its last step, not with its data."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def random_batches(model: L.LightningModule, steps: int, micro: int, size: int) -> list[Batch]:
    """A batch (A, B, T) of uniform random tokens for every step, the same ones each time."""
    length, generator = min(model.context, LENGTH), torch.Generator().manual_seed(7)
    tokens = torch.randint(model.vocab_size, (steps, micro, size, length + 1), generator=generator)
    return [(t[..., :-1], t[..., 1:]) for t in tokens]


def seed_everything(seed: int) -> None:
    """Put the global generators of torch, numpy and Python into a state of their own."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def aside(seed: int = 0) -> Iterator[None]:
    """Nothing is printed, and whatever is drawn inside changes no generator outside, nor the other way round."""
    threads = torch.get_num_threads()
    loggers = [logging.getLogger(f"lightning.{name}") for name in ("pytorch", "fabric")]
    levels, drawn = [log.level for log in loggers], (random.getstate(), np.random.get_state())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for log in loggers:
                log.setLevel(logging.ERROR)
            torch.set_num_threads(1)  # tiny tensors are slower on many, and sums are made in one order
            seed_everything(seed)
            yield
        finally:
            torch.set_num_threads(threads)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])
            for log, level in zip(loggers, levels, strict=True):
                log.setLevel(level)


def fit(
    model: L.LightningModule,
    batches: Sequence[Batch],
    *callbacks: L.Callback,
    clip: float | None = None,
    steps: int | None = None,
    resume: Path | None = None,
) -> L.Trainer:
    """Train a copy of the model, which is the returned trainer's `lightning_module`; eagerly, whatever its backend is.

    Args:
        model: a `LanguageModel`; what is in eval mode stays in it.
        batches: one for every step that is taken here.
        callbacks: what watches the run.
        clip: the norm that gradients are clipped to.
        steps: length of the run, all batches by default; scalars are logged at its end.
        resume: a checkpoint to go on from.
    """
    steps = steps or len(batches)
    trainer = L.Trainer(
        max_epochs=-1, max_steps=steps, accelerator="cpu", devices=1, plugins=[LightningEnvironment()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False, log_every_n_steps=steps, gradient_clip_val=clip,
        callbacks=list(callbacks),
    )  # fmt: skip
    model = copy.deepcopy(model).cpu()
    model.backend = None
    trainer.fit(model, Steps(batches), ckpt_path=resume, weights_only=True)
    return trainer
