"""`blagpt bench memory`: one training step of a configuration under each memory policy: time and peak memory, as ratios."""

import argparse
import copy
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch

WHAT = "one training step under each memory policy: time and peak memory against none"
LAYERS = True
TOKENS = 4096  # of a small step: fewer, and weights outweigh activations, where a budget changes nothing
POLICIES = {
    "none": (None, None),
    "Budget 0.9": ({"class_path": "Budget", "init_args": {"fraction": 0.9}}, None),
    "Budget 0.5": ({"class_path": "Budget", "init_args": {"fraction": 0.5}}, None),
    "RecomputeBlocks": ("RecomputeBlocks", None),
    "bf16 weights": (None, "bf16-true"),
}  # model.memory, and the precision where it is another
COLUMNS = [
    Column("name", "policy"),
    Column("size", "batch"),
    Column("precision", "precision"),
    Column("median_ms", "ms", ",.1f"),
    Column("time_ratio", "time, to none", ".3f"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("memory_ratio", "memory, to none", ".3f"),
    Column("first_s", "first step s", ",.1f"),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench memory` alone takes."""
    p.usage = "blagpt bench memory [FILE[+FILE ...]] [--config FILE ...] [--key value ...] [options]"
    p.epilog = "The configuration is named as for `blagpt fit`, and must have no model.memory of its own."
    p.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="NAME", help=f"({', '.join(POLICIES)})")
    p.add_argument("--device-batch-size", type=int, default=None, metavar="B", help="(full: as configured)")
    p.add_argument("--compile", default=None, metavar="BACKEND", help="inductor, ...  (as configured)")
    p.set_defaults(repeats=3, warmup=1)


def under(tree: dict, memory: object) -> dict:
    """A configuration with this memory policy.

    Raises:
        ConfigError: it has one already.
    """
    model = copy.deepcopy(tree["model"])
    model = {"class_path": model} if isinstance(model, str) else model
    values = model.get("init_args") or {}
    if values.get("memory") is not None:
        raise ConfigError("model.memory: is set (expected none: each policy is measured here); fix: leave it out")
    return {**tree, "model": {**model, "init_args": {**values, **({} if memory is None else {"memory": memory})}}}


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time a step under each policy, in turn.

    Raises:
        ConfigError: a configuration or an option is wrong.
    """
    from blagpt_pl.lab import stepper
    from blagpt_pl.lab.quiet import quiet

    quiet()
    if unknown := [name for name in args.policies if name not in POLICIES]:
        raise ConfigError(f"--policies: {unknown[0]!r} (expected of {', '.join(map(repr, POLICIES))})")
    (_, layers), is_small = stepper.one_configuration(args.layers), args.size == "small"
    tree = stepper.compiled_by(stepper.small(layers.tree) if is_small else layers.tree, args.compile)
    batch = stepper.batch_of(tree, TOKENS if is_small else None, args.device_batch_size)
    steppers, rows = [], []
    with stepper.many_graphs():
        for name in dict.fromkeys(("none", *args.policies)):
            memory, other = POLICIES[name]
            precision = other or layers.tree.get("trainer", {}).get("precision") or "32-true"
            steppers.append(stepper.of_configuration(name, layers, under(tree, memory), device, batch, precision))
            rows.append({"precision": str(precision)})
        times = timed([Case(s.name, s.step, s.tokens) for s in steppers], args.repeats, args.warmup, device)
    rows = [{**s.numbers(t, device), **row} for s, t, row in zip(steppers, times, rows, strict=True)]
    for row in rows:
        row["time_ratio"] = row["median_ms"] / rows[0]["median_ms"]
        row["memory_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
    shape = ", made small (width <= 192, 4 blocks, V <= 8192)" if is_small else ""
    how = "eager" if (backend := stepper.backend_of(tree)) == "eager" else f"compiled by {backend}"
    panels = [("time_ratio", "time, to none"), ("memory_ratio", "peak memory, to none")]
    notes = ["Peak: weights, optimizer's state and the most that a step has allocated beyond them."]
    if device.type == "cpu":
        notes.append("On a CPU products in bfloat16 may be slower than in float32, and attention keeps other tensors.")
    return Report(
        f"memory: zero_grad, objective, backward, optimizer on one random batch, {how}{shape}",
        COLUMNS,
        rows,
        notes,
        partial(bars, rows=rows, label="name", panels=panels),
    )
