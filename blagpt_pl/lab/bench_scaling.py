"""`blagpt bench scaling`: what a token costs against the length of the context and against the size of the model.

Context  the same number of tokens a step, cut into fewer and longer sequences
Size     width and depth of the configuration by one factor; heads stay as many and grow wider, the vocabulary stays
Fit      least squares of log cost against log length (or log parameters): cost ~ length^a
"""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, short
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from blagpt_pl.lab.layers import Layers
    from blagpt_pl.lab.stepper import Stepper

WHAT = "what a token costs against the length of the context and the size of the model"
LAYERS = True
LENGTHS = {"small": [256, 512, 1024, 2048, 4096], "full": [1024, 2048, 4096, 8192, 16384]}
FACTORS = {"small": [0.5, 1.0, 1.5, 2.0], "full": [0.25, 0.5, 1.0, 1.5]}  # of the (small) configuration
TOKENS = {"small": 4096, "full": 32768}  # of a step, for the lengths
BATCH_TOKENS = {"small": 1024, "full": 32768}  # likewise, for the sizes
CONTEXT, SIZE = "context", "size"
COLUMNS = [
    Column("against", "against"),
    Column("size", "batch"),
    Column("parameters_m", "parameters M", ",.1f"),
    Column("median_ms", "ms", ",.1f"),
    Column("us_per_token", "us a token", ",.3f"),
    Column("tflops", "TFLOP/s", ".3g"),
    Column("mfu", "MFU", ".1%"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("ratio", "a token, to the first", ".3f"),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench scaling` alone takes."""
    p.usage = "blagpt bench scaling [FILE[+FILE ...]] [--config FILE ...] [--key value ...] [options]"
    p.add_argument(
        "--lengths", nargs="+", type=int, default=None, metavar="T", help="(small: 256 to 4096; full: 1024 to 16384)"
    )
    p.add_argument(
        "--factors", nargs="+", type=float, default=None, metavar="X", help="(small: 0.5 to 2; full: 0.25 to 1.5)"
    )
    p.add_argument("--compile", default=None, metavar="BACKEND", help="(small: none; full: as configured)")
    p.add_argument("--precision", default=None, help="(full: as configured; small: 32-true)")
    p.set_defaults(
        repeats=3, warmup=0
    )  # two steps of each come before: the first, and the one whose memory is measured


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """a of the least-squares fit y ~ x^a; None of fewer than two different x."""
    us, vs = [math.log(x) for x in xs], [math.log(y) for y in ys]
    u, v = sum(us) / len(us), sum(vs) / len(vs)
    spread = sum((a - u) ** 2 for a in us)
    return None if spread == 0 else sum((a - u) * (b - v) for a, b in zip(us, vs, strict=True)) / spread


def models(args: argparse.Namespace, layers: "Layers", device: "torch.device") -> list[tuple[str, "Stepper"]]:
    """The models by what they are drawn against."""
    from blagpt_pl.lab import stepper

    is_small = args.size == "small"
    tree = stepper.small(layers.tree) if is_small else layers.tree
    tree = stepper.compiled_by(tree, args.compile or ("none" if is_small else None))
    precision = stepper.precision_of(layers, is_small, args.precision)
    found = []

    def add(against: str, name: str, one: dict, tokens: int) -> None:
        batch = stepper.batch_of(one, tokens)
        found.append((against, stepper.of_configuration(name, layers, one, device, batch, precision)))

    for length in args.lengths or LENGTHS[args.size]:
        longer = {**tree, "data": {**tree["data"], "context": length}}
        add(CONTEXT, f"T {length}", longer, args.tokens)
    for factor in args.factors or FACTORS[args.size]:
        add(SIZE, f"{factor:g} x", stepper.of_size(tree, factor, factor), BATCH_TOKENS[args.size])
    return found


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time a step of each length and each size, in turn.

    Raises:
        ConfigError: several configurations, or one that is wrong; lengths that are not each a divisor of the tokens.
    """
    from blagpt_pl.lab import stepper
    from blagpt_pl.lab.quiet import quiet

    quiet()
    name, layers = stepper.one_configuration(args.layers)
    lengths = args.lengths or LENGTHS[args.size]
    args.tokens = max(TOKENS[args.size], *lengths) if args.lengths is None else max(lengths)
    for option, given, least in (("lengths", lengths, 1), ("factors", args.factors or FACTORS[args.size], 1e-3)):
        if wrong := [x for i, x in enumerate(given) if x < least or x in given[:i]]:
            raise ConfigError(f"--{option}: {wrong[0]} (expected {least} or more, and each once)")
    if wrong := [t for t in lengths if args.tokens % t]:
        raise ConfigError(f"--lengths: {wrong[0]} (expected divisors of {args.tokens}, so that all steps are as large)")
    with stepper.many_graphs():
        found = models(args, layers, device)
        times = timed([Case(s.name, s.step, s.tokens) for _, s in found], args.repeats, args.warmup, device)
    rows = [{"against": against, **s.numbers(t, device)} for (against, s), t in zip(found, times, strict=True)]
    for row in rows:
        first = next(r for r in rows if r["against"] == row["against"])
        row["context"] = int(row["size"].split(" x ")[1])
        row["parameters_m"] = row["parameters"] / 1e6
        row["ratio"] = row["us_per_token"] / first["us_per_token"]
    made = "made small; float32, eager unless said" if args.size == "small" else "as configured"
    return Report(
        f"scaling: a training step of {name} ({made})", COLUMNS, rows, [*fits(rows), stepper.peak_note(device)],
        lambda figure: draw(figure, rows),
    )  # fmt: skip


def fits(rows: Sequence[dict]) -> list[str]:
    """A line for each exponent."""
    said = []
    for against, x, word in ((CONTEXT, "context", "T"), (SIZE, "parameters", "parameters")):
        mine = [row for row in rows if row["against"] == against]
        for y, what in (("us_per_token", "time a token"), ("peak_mib", "peak memory")):
            a = exponent([row[x] for row in mine], [row[y] for row in mine])
            if a is not None:
                between = f"{mine[0][x]:,} to {mine[-1][x]:,}"
                said.append(f"Fit: {what} ~ {word}^{a:.2f} between {between} ({len(mine)} points).")
    return said


def draw(figure: "Figure", rows: Sequence[dict]) -> None:
    """Time a token and peak memory, against the context above and against the size below."""
    figure.set_size_inches(7.8, 5.8)
    grid = figure.subplots(2, 2)
    for axes, against, x, title in zip(
        grid, (CONTEXT, SIZE), ("context", "parameters"), ("context, tokens", "parameters"), strict=True
    ):
        mine = [row for row in rows if row["against"] == against]
        for ax, y, name in zip(axes, ("us_per_token", "peak_mib"), ("us a token", "peak memory, MiB"), strict=True):
            ax.plot([row[x] for row in mine], [row[y] for row in mine], marker="o", markersize=4)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.set_xticks([row[x] for row in mine], [short(row[x]) for row in mine])
            ax.yaxis.set_major_formatter(lambda value, _: short(value))
            ax.minorticks_off()
            ax.margins(x=0.12)
            ax.set_ylim(min(row[y] for row in mine) / 1.5, max(row[y] for row in mine) * 1.5)
            for row in mine:
                at = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center", "fontsize": 8}
                ax.annotate(short(row[y]), (row[x], row[y]), **at)
            ax.set_xlabel(title)
            ax.set_title(name, fontsize=9)
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.set_axisbelow(True)
