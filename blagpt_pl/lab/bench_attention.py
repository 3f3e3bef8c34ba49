"""`blagpt bench attention`: forward and backward of one core against the length of the sequence."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, lines
from blagpt_pl.lab.timing import Case, spread, timed

if TYPE_CHECKING:
    import torch

    from blagpt_pl.nn.base import Core, Heads

WHAT = "time attention cores against the length of the sequence"
CORE_VALUES = {  # of the cores that need some: the overlay's
    "Dilated": {"segments": [64, 128, 256, 512, 1024], "dilations": [1, 2, 4, 8, 16]},
    "Windowed": {"window": 256},
}
WIDTHS = {"B": 1, "H": 12, "G": 4, "K": 64}  # the baseline's heads, one sequence
LENGTHS = {"small": [1024, 2048, 4096, 8192], "full": [1024, 2048, 4096, 8192, 16384, 32768]}
REFERENCE = "SDPA"  # what the last column compares with, where it was run
COLUMNS = [
    Column("name", ""),
    Column("tokens", "tokens"),
    Column("median_ms", "median ms", ".2f"),
    Column("fastest_ms", "fastest", ".2f"),
    Column("slowest_ms", "slowest", ".2f"),
    Column("to_shortest", "to shortest", "{:.2f} x".format),
    Column("to_reference", f"to {REFERENCE}", "{:.2f} x".format),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench attention` alone takes."""
    p.add_argument("--cores", nargs="+", default=["SDPA", "Dilated"], metavar="NAME", help="(SDPA Dilated)")
    p.add_argument(
        "--lengths", nargs="+", type=int, default=None, metavar="T", help="tokens  (1024 to 8192; full: to 32768)"
    )
    p.add_argument("--compile", default=None, metavar="BACKEND", help="compile each core: inductor, ...  (eager)")


def core_named(name: str, heads: "Heads") -> "Core":
    """The core of that name.

    Raises:
        ConfigError: no core has this name, or it cannot be built from the heads and `CORE_VALUES` alone.
    """
    from blagpt_pl.lab.parts import known_classes
    from blagpt_pl.nn.base import Core

    known = {cls.__name__: cls for cls in known_classes() if issubclass(cls, Core) and cls is not Core}
    if name not in known:
        raise ConfigError(f"--cores: {name!r} is not a core (expected of {', '.join(sorted(known))})")
    try:
        return known[name](heads, **CORE_VALUES.get(name, {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--cores: {name} cannot be built here: {error}") from None


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time forward and backward of each core at each length, in turn.

    Raises:
        ConfigError: a core that there is not, a length below 1, or one of them twice.
    """
    import torch

    from blagpt_pl.nn.base import Heads, Site

    lengths = args.lengths or LENGTHS[args.size]
    for option, given in (("cores", args.cores), ("lengths", lengths)):
        if len(set(given)) < len(given):
            raise ConfigError(f"--{option}: {' '.join(map(str, given))} (expected each once)")
    if (least := min(lengths)) < 1:
        raise ConfigError(f"--lengths: {least} (expected 1 or more)")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    compiles = args.compile not in (None, "none")
    b, h, g, k = WIDTHS.values()
    kernels: dict[str, dict[str, None]] = {}  # by core: what it runs by, in the order of the lengths

    def case(name: str, tokens: int) -> Case:
        core = core_named(name, Heads(Site(h * k, 12, 0, 50304, tokens), h, g, k))
        if (say := getattr(core, "kernel", None)) is not None:
            kernels.setdefault(name, {})[say(device, dtype, tokens)] = None
        if compiles:
            core.compile(backend=args.compile, fullgraph=True, dynamic=False)
        dice = torch.Generator(device).manual_seed(0)
        q, key, v, toward = (
            torch.randn(b, n, tokens, k, generator=dice, device=device, dtype=dtype) for n in (h, g, g, h)
        )
        inputs = [x.requires_grad_() for x in (q, key, v)]
        return Case(name, lambda: torch.autograd.grad(core(*inputs), inputs, toward), tokens)

    cases = [case(name, tokens) for name in args.cores for tokens in lengths]
    rows = rows_of(cases, timed(cases, args.repeats, args.warmup, device))
    sizes = ", ".join(f"{letter} {n}" for letter, n in WIDTHS.items())
    how = f"compiled by {args.compile}" if compiles else "eager"
    what = f"attention: forward and backward of one core, {sizes}, {str(dtype).removeprefix('torch.')}, {how}"
    notes = [f"{name} runs by {' and '.join(found)}." for name, found in kernels.items()]
    title = f"forward and backward of one core, {sizes}"
    draw = partial(
        lines, rows=rows, x=("tokens", "tokens"), panels=[("median_ms", "ms")], series="name", title=title
    )  # fmt: skip
    return Report(what, COLUMNS, rows, notes, draw)


def rows_of(cases: list[Case], times: list[list[float]]) -> list[dict]:
    """The medians, and what they are of one another."""
    rows = [{"name": c.name, "tokens": c.tokens, **spread(t)} for c, t in zip(cases, times, strict=True)]
    median = {(row["name"], row["tokens"]): row["median_ms"] for row in rows}
    for row in rows:
        shortest = min(tokens for name, tokens in median if name == row["name"])
        reference = median.get((REFERENCE, row["tokens"]))
        row["to_shortest"] = row["median_ms"] / median[row["name"], shortest]
        row["to_reference"] = None if reference is None else row["median_ms"] / reference
    return rows
