"""What makes a resumed run the uninterrupted one: Lightning's loop counters, written as they are between two steps.

A checkpoint holds only the number of steps taken; data order and randomness are functions of it. Lightning however saves
its loops in the middle of something (a batch begun, a validation over) and tries to finish that on restart. Here the
saved counters say "this many steps are complete, nothing is under way", and a restored loop starts a step like any other.
The names below are Lightning 2.6's own; `tests/test_resume.py` fails if they change.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from blagpt_pl.errors import CheckpointError


def between_steps(loops: dict[str, Any], step: int) -> None:
    """Rewrite the saved state of the fit loop, in place, as it is between step `step` and the next."""
    fit = loops["fit_loop"]
    epoch = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    batches = dict.fromkeys(("ready", "started", "processed", "completed"), step)
    cleared = dict.fromkeys(("ready", "started", "completed"), step)
    stepped = dict.fromkeys(("ready", "completed"), step)

    def twice(counts: dict[str, int]) -> dict[str, dict[str, int]]:
        return {"total": dict(counts), "current": dict(counts)}

    fit["epoch_progress"] = twice(epoch)
    fit["epoch_loop.batch_progress"] = {**twice(batches), "is_last_batch": False}
    fit["epoch_loop.scheduler_progress"] = twice(stepped)
    optimizer = {"step": twice(stepped), "zero_grad": twice(cleared)}
    fit["epoch_loop.automatic_optimization.optim_progress"] = {"optimizer": optimizer}
    fit["epoch_loop.state_dict"] = {**fit.get("epoch_loop.state_dict", {}), "_batches_that_stepped": step}
    for name in [key for key in fit if key.startswith("epoch_loop.val_loop.")]:
        del fit[name]


def number_by_model(state: dict[str, Any], optimizer: Optimizer, parameters: list[Parameter]) -> None:
    """Renumber a saved optimizer's parameters, in place, by their place in the model instead of in the groups.

    That is how FSDP2 numbers them, so that a checkpoint written without it can be read with it.
    """
    place = {id(p): i for i, p in enumerate(parameters)}
    renumbered: dict[int, int] = {}
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        renumbered |= {number: place[id(p)] for number, p in zip(saved["params"], group["params"], strict=True)}
        saved["params"] = [renumbered[number] for number in saved["params"]]
    state["state"] = {renumbered.get(number, number): value for number, value in state["state"].items()}


def start_afresh(trainer: L.Trainer) -> None:
    """Tell restored loops that no step and no validation is under way."""
    loop = trainer.fit_loop.epoch_loop
    loop.restarting = False
    loop.val_loop.restarting = False


def check_fits(saved: Mapping[str, Any], model: Module) -> None:
    """Refuse the weights of another model before torch does, which would list every tensor.

    Args:
        saved: the checkpoint's state dict.
        model: what it is to be loaded into.

    Raises:
        CheckpointError: a tensor is missing, has no place, or is of another shape.
    """
    own = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
    there = {name: getattr(value, "shape", None) for name, value in saved.items()}
    fix = f"a checkpoint of this {type(model).__name__}, or the configuration it was trained with"
    for name in (*own, *there):
        if name not in there or name not in own:
            what = f"holds no {name}" if name in own else f"holds {name}, which has no place here"
            raise CheckpointError(f"ckpt_path: the checkpoint {what}; fix: {fix}")
        if own[name] != there[name]:
            shapes = f"{tuple(there[name] or ())} there, {tuple(own[name] or ())} here"
            raise CheckpointError(f"ckpt_path: {name} is {shapes}; fix: {fix}")
