"""`blagpt bench step`: one training step of configurations side by side: time, work, memory."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch

WHAT = "one training step of configurations side by side: time, tokens a second, MFU, memory"
LAYERS = True
TOKENS = 1024  # of a small step
COLUMNS = [
    Column("name", ""),
    Column("parameters_m", "parameters M", ",.1f"),
    Column("size", "batch"),
    Column("compile", "compiled by"),
    Column("precision", "precision"),
    Column("median_ms", "ms", ",.1f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("mfu", "MFU", ".1%"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("first_s", "first step s", ",.1f"),
    Column("ratio", "to the first", ".3f"),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench step` alone takes."""
    p.usage = "blagpt bench step [FILE[+FILE ...] ...] [--config FILE ...] [--key value ...] [options]"
    p.epilog = (
        "Each word before the options is a row: a configuration, with its overlays after a +. --config and --key are "
        "those of `blagpt fit`, and hold for every row."
    )
    p.add_argument("--device-batch-size", type=int, default=None, metavar="B", help="(full: as configured)")
    p.add_argument("--compile", default=None, metavar="BACKEND", help="inductor, ..., or none  (as configured)")
    p.add_argument("--precision", default=None, help="(full: as configured; small: 32-true)")
    p.set_defaults(repeats=5, warmup=1)


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time a step of each configuration, in turn.

    Raises:
        ConfigError: a configuration is wrong, or an option is.
    """
    from blagpt_pl.lab import stepper
    from blagpt_pl.lab.quiet import quiet

    quiet()
    is_small = args.size == "small"
    steppers, rows = [], []
    with stepper.many_graphs():
        for name, layers in stepper.configurations(args.layers):
            tree = stepper.compiled_by(stepper.small(layers.tree) if is_small else layers.tree, args.compile)
            batch = stepper.batch_of(tree, TOKENS if is_small else None, args.device_batch_size)
            precision = stepper.precision_of(layers, is_small, args.precision)
            steppers.append(stepper.of_configuration(name, layers, tree, device, batch, precision))
            rows.append({"compile": stepper.backend_of(tree), "precision": str(precision)})
        times = timed([Case(s.name, s.step, s.tokens) for s in steppers], args.repeats, args.warmup, device)
    rows = [{**s.numbers(t, device), **row} for s, t, row in zip(steppers, times, rows, strict=True)]
    for row in rows:
        row["parameters_m"] = row["parameters"] / 1e6
        row["ratio"] = row["median_ms"] / rows[0]["median_ms"]
    shape = ", configurations made small (width <= 192, 4 blocks, V <= 8192; float32 unless said)" if is_small else ""
    panels = [("median_ms", "ms a step"), ("peak_mib", "peak memory, MiB"), ("first_s", "first step, s")]
    return Report(
        f"step: zero_grad, objective, backward, optimizer on one random batch{shape}",
        COLUMNS,
        rows,
        [
            stepper.peak_note(device),
            "Peak: weights, optimizer's state and the most that a step has allocated beyond them.",
            "First step: with compilation, if torch's caches on disk did not have it.",
        ],
        partial(bars, rows=rows, label="name", panels=panels),
    )
