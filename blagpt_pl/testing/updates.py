"""The promise of an optimizer: it has every parameter once, and moves every group of them by a sensible amount.

Ratio    of a group, in one step: RMS of the change over RMS of the weights before, over all tensors of the group; the mean of 8
         steps at the full learning rate. Eight, because RAdam takes its first five without an adaptive step size. Weight decay is
         off, since it moves weights that no gradient moves.
Rule     a group that has gradients moves by at least 1e-6 of its size in its largest step: a thousand smaller ones are less than
         a tenth of a percent. Every tensor that has a gradient moves at all.
Way      over these steps a group moves against its gradient; a first step at a tenth of the learning rate is less than half of
         one at the full rate, so that a schedule reaches it
Company  one tensor of each group is stepped alone, too. An update that is less than half as large in company is limited as a
         whole (an update clipped to a global norm, after it has been normalised), for torch's optimizers treat each tensor alone.
Clipping the same steps with `trainer.gradient_clip_val`: in one of them at least, each group's ratio is half or more of what it
         is without. An update that does not depend on the gradient's size passes; one in proportion to it shrinks with it.
         All of it at the size of the model that is examined.
"""

import math
from collections import Counter
from functools import partial
from statistics import fmean

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.optim.schedule import Schedule
from blagpt_pl.testing.promises import noisy
from blagpt_pl.testing.running import aside, fit, random_batches

STEPS = 8
LEAST = 1e-6  # of a group's size, a step
FAINT = 1e-4  # a gradient this small beside the largest one may be rounding, such as that of a key's bias


def labels_of(groups: list[dict]) -> list[str]:
    """A name for each group: its role, or its number; both where several have the role."""
    roles = [str(group.get("role", f"group {i}")) for i, group in enumerate(groups)]
    return [role if roles.count(role) == 1 else f"{role} (group {i})" for i, role in enumerate(roles)]


def audit(groups: list[dict], model: L.LightningModule) -> None:
    """Every trainable parameter is in exactly one place of the groups, and nothing else is."""
    names = {id(p): name for name, p in model.named_parameters()}
    places = Counter(id(p) for group in groups for p in group["params"])
    for label, group in zip(labels_of(groups), groups, strict=True):
        for p in group["params"]:
            name = names.get(id(p), f"a tensor {tuple(p.shape)}")
            assert id(p) in names, f"the optimizer has {name} in {label}, which is no parameter of the model"
            assert p.requires_grad, f"the optimizer has {name} in {label}, which is frozen"
            assert places[id(p)] == 1, f"the optimizer has {name} {places[id(p)]} times"
    for name, p in model.named_parameters():
        assert not p.requires_grad or places[id(p)], f"the optimizer has no {name}: it is trainable, but in no group"


class Updates(L.Callback):
    """What each step does to the parameters.

    Args:
        alone: name of the only parameter whose gradient the optimizer gets to see; all by default.

    Attributes:
        ratios: of every group, step by step.
        largest: of every tensor, the RMS of its largest gradient.
        first: of every tensor, the norm of its first update.
        moved: the tensors that have moved at all.
        members: the tensors of every group.
        along: of every group, the sum over the steps of the cosine between its update and its gradient.
    """

    def __init__(self, alone: str | None = None) -> None:
        self.alone = alone
        self.ratios: dict[str, list[float]] = {}
        self.largest: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.moved: set[str] = set()
        self.members: dict[str, list[str]] = {}
        self.along: Counter[str] = Counter()
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        audit(groups, module)
        names = {id(p): name for name, p in module.named_parameters()}
        for label, group in zip(labels_of(groups), groups, strict=True):
            self.members[label] = [names[id(p)] for p in group["params"]]
            if "weight_decay" in group:
                group["weight_decay"] = 0.0

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        for name, p in module.named_parameters():
            if self.alone not in (None, name):
                p.grad = None
            self._before[name] = p.detach().clone()
            self._gradients[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            size = 0.0 if p.grad is None else p.grad.double().square().mean().sqrt().item()
            self.largest[name] = max(self.largest.get(name, 0.0), size)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        change, size, dot, slope = {}, {}, {}, {}
        for name, p in module.named_parameters():
            before, gradient = self._before[name].double(), self._gradients[name].double()
            update = p.detach().double() - before
            change[name], size[name], slope[name] = (t.norm().item() for t in (update, before, gradient))
            dot[name] = (update * gradient).sum().item()
        self.first = self.first or change
        self.moved |= {name for name, norm in change.items() if norm != 0}
        for label, members in self.members.items():
            step, weights = (math.hypot(*(norms[name] for name in members)) for norms in (change, size))
            self.ratios.setdefault(label, []).append(step / weights if weights else math.inf)
            steep = math.hypot(*(slope[name] for name in members))
            if step and steep and math.isfinite(step * steep):
                self.along[label] += sum(dot[name] for name in members) / (step * steep)

    def ratio(self, label: str) -> float:
        """A group's ratio: the mean over the steps."""
        return fmean(self.ratios[label])

    def has_gradient(self, label: str) -> bool:
        """Whether any gradient has reached a group."""
        return any(self.largest[name] > 0 for name in self.members[label])


class Factor(Schedule):
    """One factor for all steps."""

    def __init__(self, total_steps: int, factor: float) -> None:
        super().__init__(total_steps)
        self._factor = factor

    def factor(self, step: int) -> float:
        return self._factor


def check_moves(updates: Updates) -> None:
    """Every group and every tensor that has a gradient moves, by a finite amount."""
    for label in filter(updates.has_gradient, updates.members):
        ratio = updates.ratio(label)
        assert math.isfinite(ratio), f"{label} moves by {ratio} of its size in {STEPS} steps: the update is not finite"
        assert ratio, f"{label} does not move in {STEPS} steps, although it has gradients: is its learning rate 0?"
        most = max(updates.ratios[label])
        assert most >= LEAST, (
            f"{label} is throttled: no step at the full learning rate moves it by more than {most:.1e} of its size "
            f"(expected {LEAST:.0e} or more)"
        )
        assert updates.along[label] < 0, f"{label} moves along its gradient, not against it: the loss is made larger"
    loudest = max(updates.largest.values(), default=0.0)
    for name, size in updates.largest.items():
        assert name in updates.moved or size <= FAINT * loudest, (
            f"{name} does not move in {STEPS} steps, although it has a gradient (RMS {size:.1e})"
        )


def check_company(updates: Updates, run: "Run") -> None:
    """No update is smaller because other tensors have gradients, too."""
    for label in filter(updates.has_gradient, updates.members):
        name = max(updates.members[label], key=updates.first.get)
        together, alone = updates.first[name], run(Updates(alone=name), steps=1).first[name]
        assert together >= alone / 2, (
            f"{label} is throttled: a step of all parameters moves {name} by {together:.1e}, one of its own by {alone:.1e}; "
            "the optimizer limits its update as a whole"
        )


def check_rate(updates: Updates, run: "Run") -> None:
    """A first step at a tenth of the learning rate is less than half of one at the full rate."""
    slow = run(Updates(), steps=1, factor=0.1)
    for label in filter(updates.has_gradient, updates.members):
        full, tenth = (math.hypot(*(u.first[name] for name in u.members[label])) for u in (updates, slow))
        assert tenth <= full / 2, (
            f"{label} moves by {full:.1e} in its first step, and by {tenth:.1e} at a tenth of the learning rate: the schedule "
            "does not reach it"
        )


class Run:
    """The same steps again and again, each time from the same start."""

    def __init__(self, model: L.LightningModule) -> None:
        self.model = noisy(model).train()
        self.batches = random_batches(model, STEPS, 1, 2)

    def __call__(self, updates: Updates, steps: int = STEPS, clip: float | None = None, factor: float = 1.0) -> Updates:
        self.model.schedule_factory = partial(Factor, factor=factor)
        fit(self.model, self.batches[:steps], updates, clip=clip)
        return updates


def check_optimizer(model: L.LightningModule, clip: float | None = None) -> str:
    """The optimizer has every trainable parameter once, and moves every group by a sensible amount.

    Args:
        model: a `LanguageModel`, freshly built; left as it was.
        clip: `trainer.gradient_clip_val`, the norm that gradients are clipped to in training.

    Raises:
        AssertionError: a parameter is missing, double, frozen or foreign; a group or tensor does not move, or is throttled.
    """
    with aside():
        run = Run(model)
        free = run(Updates())
        check_moves(free)
        check_company(free, run)
        check_rate(free, run)
        told = [
            f"{label} {free.ratio(label):.1e}" if free.has_gradient(label) else f"{label} (no gradient)"
            for label in free.members
        ]
        said = f"{', '.join(told)} of its size a step"
        if not clip:
            return said
        clipped = run(Updates(), clip=clip)
        for label in filter(free.has_gradient, free.members):
            shares = [
                after / before
                for before, after in zip(free.ratios[label], clipped.ratios[label], strict=True)
                if before
            ]
            assert max(shares) >= 0.5, (
                f"trainer.gradient_clip_val={clip} throttles {label}: it moves by {clipped.ratio(label):.1e} of its size a "
                f"step, without by {free.ratio(label):.1e}"
            )
        told = [f"{clipped.ratio(label):.1e}" for label in free.members]
        return f"{said}; {', '.join(told)} when clipped to {clip}"
