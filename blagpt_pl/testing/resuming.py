"""The promise of resuming: 4 steps are, to the bit, 2 steps, a checkpoint, and 2 more of another copy of the model.

Setting  two micro-batches a step, dropout as configured, a schedule that changes at every step; the global generators of torch,
         numpy and Python stand elsewhere when the run is resumed. The checkpoint is written between two steps, as
         `callbacks.checkpoint` does, and read with weights_only.
Compared losses, parameters, buffers, the state and the groups of the optimizer, the schedule, and what is logged
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from torch import Tensor

from blagpt_pl.optim.schedule import Cosine
from blagpt_pl.testing.promises import noisy
from blagpt_pl.testing.running import aside, fit, random_batches, seed_everything

STEPS, STOP = 4, 2  # of the run that is resumed


class Journal(L.Callback):
    """Every step's loss; and a checkpoint between two steps, if asked for."""

    def __init__(self, save: Path | None = None) -> None:
        self.losses: dict[str, Tensor] = {}
        self.save = save

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.save and trainer.global_step == STOP:
            trainer.save_checkpoint(self.save)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses[f"loss of step {trainer.global_step}"] = outputs["loss"].detach().clone()


def leaves(at: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What stands at the ends of nested dictionaries and lists, with its path."""
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(f"{at} {key}", inner)
    else:
        yield at, value


def outcome(trainer: L.Trainer, journal: Journal) -> dict[str, Any]:
    """All that a run has led to, by a name for each: parameters, buffers, optimizer, schedule, numbers."""
    model, (optimizer,) = trainer.lightning_module, trainer.optimizers
    found = {f"parameter {name}": p.detach() for name, p in model.named_parameters()}
    found |= {f"buffer {name}": b for name, b in model.named_buffers()}
    names, saved = {id(p): name for name, p in model.named_parameters()}, optimizer.state_dict()
    for numbered, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        called = {number: names.get(id(p), "?") for number, p in zip(numbered["params"], group["params"], strict=True)}
        saved["state"] = {called.get(key, key): value for key, value in saved["state"].items()}
    found |= leaves("optimizer state of", saved["state"])
    for i, group in enumerate(saved["param_groups"]):
        found |= leaves(f"optimizer group {i}", {key: value for key, value in group.items() if key != "params"})
    for config in trainer.lr_scheduler_configs:
        found |= leaves("schedule", {k: v for k, v in config.scheduler.state_dict().items() if k != "lr_lambdas"})
    return {**journal.losses, **found, **dict(leaves("logged", dict(trainer.callback_metrics)))}


def gap_between(a: Any, b: Any) -> float:
    """How far two values differ; 0 where they are the same to the bit, infinity where they cannot be compared."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        return 0.0 if torch.equal(a, b) else (a.double() - b.double()).abs().max().item()
    return 0.0 if type(a) is type(b) and a == b else float("inf")


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """The names under which two outcomes differ, and by how much; a name that only one has counts."""
    gaps = {name: gap_between(one.get(name), other.get(name)) for name in (*one, *(other.keys() - one.keys()))}
    return {name: gap for name, gap in gaps.items() if gap != 0}


def check_resume(model: L.LightningModule) -> str:
    """A run that is stopped and resumed is the uninterrupted one, to the bit; the schedule changes at every step.

    Args:
        model: a `LanguageModel`, freshly built; left as it was.

    Raises:
        AssertionError: the checkpoint cannot be read, or something differs; the message says what, and the likely cause.
    """
    with aside(), TemporaryDirectory() as folder:
        moved, file = noisy(model).train(), Path(folder) / "step.ckpt"
        moved.schedule_factory = lambda steps: Cosine(steps, warmup=0)
        batches = random_batches(model, STEPS, 2, 2)

        def run(seed: int, **options: Any) -> dict[str, Any]:
            seed_everything(seed)
            journal = Journal(options.pop("save", None))
            first = STOP if "resume" in options else 0
            trainer = fit(moved, batches[first:], journal, steps=STEPS, **options)
            return outcome(trainer, journal)

        whole = run(1, save=file)
        for name, value in whole.items():
            assert not name.startswith("loss") or value.isfinite(), f"{name} is not finite"
        try:
            resumed = run(2, resume=file)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise AssertionError(f"the checkpoint cannot be taken up: {type(error).__name__}: {said}") from error
        expected = {name: v for name, v in whole.items() if name not in {f"loss of step {i + 1}" for i in range(STOP)}}
        gaps = differences(expected, resumed)
        if gaps:
            cause = likely_cause(moved, gaps, differences(whole, run(2)))
            parameters = [name for name in gaps if name.startswith("parameter")]
            worst = max(parameters or gaps, key=gaps.get)
            raise AssertionError(
                f"{worst} differs by {gaps[worst]:.1e} after resuming at step {STOP} of {STEPS} ({len(gaps)} values differ, "
                f"first the {next(iter(gaps))}); likely cause: {cause}"
            )
    return f"{STOP} steps and {STEPS - STOP} resumed are {STEPS} steps: {len(expected)} values equal to the bit"


def likely_cause(model: L.LightningModule, gaps: dict[str, float], again: dict[str, float]) -> str:
    """Why a resumed run differs.

    Args:
        model: what was run.
        gaps: what differs from the uninterrupted run.
        again: what differs between two uninterrupted runs that find the global generators in other states.
    """
    if again:
        return "randomness that is no function of the step, for two uninterrupted runs differ as well (random, numpy.random)"
    kept = model.state_dict().keys()
    if lost := [n for n in gaps if n.startswith("buffer") and n.removeprefix("buffer ") not in kept]:
        return f"{lost[0]} is no part of the checkpoint (persistent=False)"
    if f"loss of step {STOP + 1}" in gaps:
        return "state of the model outside its state_dict: a plain attribute, or a random generator of its own"
    if any(not name.startswith("logged") for name in gaps):
        return "state of the optimizer or of the schedule outside its state_dict, or a random generator of its own"
    return "numbers that are logged over several steps, which on_save_checkpoint does not save"
