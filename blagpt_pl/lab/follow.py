"""One training step, followed: what is alive in its forward, loss, backward and optimizer's step, by category.

Kinds weights (and buffers); gradients; optimizer (its state); casts (copies of the weights in another type, kept until
      backward or until autocast ends); activations (what the trunk keeps for backward); logits (what the loss adds: logits of a
      chunk and their gradients, the stored gradients of features and head, further heads); temporaries (the rest)
When  a step of two micro-batches is made: the second one finds the first one's gradients, as all but the first of a step do.
      The optimizer's state is there from a run's first step on, so it is counted in all
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.storages import Storages
from blagpt_pl.lm import LanguageModel
from blagpt_pl.nn.autocast import without_autocast

MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
TRUE = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
SAME = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True)
class Peaks:
    """Bytes by category, at the worst instant of each moment of one step.

    Attributes:
        first, later: moment -> bytes, in the step's first micro-batch and in every later one: forward, loss, backward, and
            the optimizer's step, which is the same in both.
        kept: what is alive between a later micro-batch's forward and its backward.
        problem: why the optimizer's state is not among them, or None.
    """

    first: dict[str, Counter[str]]
    later: dict[str, Counter[str]]
    kept: Counter[str]
    problem: str | None = None


def named_precision(precision: str | int) -> str:
    """A precision in the words of `MIXED` and `TRUE`.

    Raises:
        ConfigError: one that is not counted here.
    """
    name = SAME.get(str(precision), str(precision))
    if name not in MIXED and name not in TRUE:
        known = ", ".join((*MIXED, *TRUE))
        raise ConfigError(f"trainer.precision: {precision!r} (its memory is not counted; expected one of {known})")
    return name


def autocast_of(precision: str | int) -> AbstractContextManager:
    """The trainer's autocast, for tensors on the CPU."""
    name = named_precision(precision)
    return torch.autocast("cpu", MIXED[name]) if name in MIXED else nullcontext()


def cast(model: LanguageModel, precision: str | int) -> None:
    """What `-true` precisions do to the weights."""
    dtype = TRUE.get(named_precision(precision))
    if dtype is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


@contextmanager
def marked(model: LanguageModel, storages: Storages) -> Iterator[None]:
    """Between the features and backward it is the loss that allocates."""

    def then(function: Callable) -> Callable:
        def called(*args: object, **kwargs: object) -> object:
            out = function(*args, **kwargs)
            storages.enter("loss", "logits")
            return out

        return called

    names = ("finish", "features")
    for name in names:
        object.__setattr__(model, name, then(getattr(model, name)))
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: storages.relabel([p.grad], "gradients"))
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for name in names:
            object.__delattr__(model, name)
        for handle in handles:
            handle.remove()


def follow(
    model: LanguageModel, tokens: Tensor, targets: Tensor, autocast: AbstractContextManager, storages: Storages
) -> Peaks:
    """Make one step of two equal micro-batches, with real tensors or fake ones, and say what was alive.

    Args:
        model: in train mode, without gradients; it has none afterwards, but has been stepped.
        tokens, targets: (b, T) int64, one micro-batch.
        autocast: as the trainer enters it around a step.
        storages: has seen nothing yet.
    """
    peaks: list[dict[str, Counter[str]]] = []
    with storages, marked(model, storages), ExitStack() as stack:
        storages.relabel([*model.parameters(), *model.buffers()], "weights")
        storages.relabel([tokens, targets], "activations")
        stack.enter_context(autocast)
        for micro in range(2):
            storages.peaks = {}
            storages.enter("forward", "activations")
            loss = model.objective(tokens, targets)[0]
            storages.enter("backward", "temporaries")
            kept = storages.alive.copy()
            if micro:
                stack.pop_all().close()  # the trainer's autocast ends before the last backward
            with without_autocast(loss.device):
                loss.backward()
            del loss
            peaks.append(
                {name: storages.peaks[name] for name in ("forward", "loss", "backward") if name in storages.peaks}
            )
        stepped, problem = step_twice(model, storages)
    for moments in peaks:
        moments["optimizer step"] = stepped.copy()
    for instant in (*peaks[0].values(), *peaks[1].values(), kept):
        instant["optimizer"] = stepped["optimizer"]  # there since the first step of a run
    model.zero_grad()
    return Peaks(*peaks, kept, problem)


def step_twice(model: LanguageModel, storages: Storages) -> tuple[Counter[str], str | None]:
    """The peak of an optimizer's step that finds its state there, and what kept it from running."""
    storages.enter("first optimizer step", "temporaries")
    optimizer = model.make_optimizer()
    try:
        optimizer.step()
        state = [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]
        storages.relabel(state, "optimizer")
        storages.enter("optimizer step", "temporaries")
        optimizer.step()
    except Exception as error:  # noqa: BLE001  whatever an optimizer of anybody's does with tensors that have no data
        kind, words = type(error).__name__, (str(error).splitlines() or [""])[0]
        return storages.alive.copy(), f"{type(optimizer).__name__} does not run without data ({kind}: {words})"
    return storages.peaks["optimizer step"], None
