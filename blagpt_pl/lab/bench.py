"""`blagpt bench`: how long things take, measured the same way every time.

A benchmark is a list of cases, and a case is a function without arguments that does the work once. Cases take turns: every
round runs each of them once, so that a machine that gets slower or busier does so for all of them alike. The first rounds
are not counted (warm-up, compilation). What is reported is the median, and beside it the fastest and the slowest round.

A new benchmark is one entry of `BENCHMARKS`: what it takes, and how its cases are made of that.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from blagpt_pl.nn.base import Core, Heads

REFERENCE = "SDPA"
CORE_VALUES = {  # of the cores that need some: the overlay's
    "Dilated": {"segments": [64, 128, 256, 512, 1024], "dilations": [1, 2, 4, 8, 16]},
}
WIDTHS = {"B": 1, "H": 12, "G": 4, "K": 64}  # the baseline's heads, one sequence


@dataclass(frozen=True)
class Case:
    """One thing to time: what is run, at how many tokens, and the function that does it once."""

    name: str
    tokens: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What came of a case.

    Attributes:
        name, tokens: the case.
        median_ms, fastest_ms, slowest_ms: of the rounds that count.
        times_ms: the rounds.
        to_shortest: median divided by that of the same name with the fewest tokens.
        to_reference: median divided by the reference's with the same tokens, or None where it was not run.
    """

    name: str
    tokens: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    times_ms: list[float]
    to_shortest: float
    to_reference: float | None


@dataclass(frozen=True)
class Benchmark:
    """A kind of measurement.

    Attributes:
        what: one line for the help.
        add: adds the options that it alone has.
        cases: options and device -> a line that says what was measured, and the cases.
    """

    what: str
    add: Callable[[argparse.ArgumentParser], None]
    cases: Callable[[argparse.Namespace, "torch.device"], tuple[str, list[Case]]]


def timed(cases: list[Case], repeats: int, warmup: int, device: "torch.device") -> list[list[float]]:
    """Milliseconds of each case, round by round; the cases take turns."""
    import torch
    from tqdm import tqdm

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times: list[list[float]] = [[] for _ in cases]
    total, pause_s = (
        (warmup + repeats) * len(cases),
        0.1 if sys.stderr.isatty() else 10.0,
    )  # between two looks of the bar
    with tqdm(total=total, desc="bench", leave=False, dynamic_ncols=True, mininterval=pause_s) as bar:
        for _ in range(warmup + repeats):
            for case, mine in zip(cases, times, strict=True):
                bar.set_postfix_str(f"{case.name} {case.tokens}", refresh=False)
                wait()
                start = time.perf_counter()
                case.run()
                wait()
                mine.append(1e3 * (time.perf_counter() - start))
                bar.update()
    return [mine[warmup:] for mine in times]


def rows_of(cases: list[Case], times: list[list[float]]) -> list[Row]:
    """The medians, and what they are of one another."""
    median = {(c.name, c.tokens): statistics.median(t) for c, t in zip(cases, times, strict=True)}
    shortest = {c.name: min(other.tokens for other in cases if other.name == c.name) for c in cases}
    return [
        Row(
            name=c.name,
            tokens=c.tokens,
            median_ms=(mine := median[c.name, c.tokens]),
            fastest_ms=min(t),
            slowest_ms=max(t),
            times_ms=t,
            to_shortest=mine / median[c.name, shortest[c.name]],
            to_reference=mine / median[REFERENCE, c.tokens] if (REFERENCE, c.tokens) in median else None,
        )
        for c, t in zip(cases, times, strict=True)
    ]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["", "tokens", "median ms", "fastest", "slowest", "to shortest", f"to {REFERENCE}"]
    body = [
        [
            r.name, str(r.tokens), *(f"{x:.2f}" for x in (r.median_ms, r.fastest_ms, r.slowest_ms)),
            f"{r.to_shortest:.2f} x", "-" if r.to_reference is None else f"{r.to_reference:.2f} x",
        ]
        for r in rows
    ]  # fmt: skip
    wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide, strict=True))]
        for line in (head, *body)
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(wide)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------------- attention


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


def attention(args: argparse.Namespace, device: "torch.device") -> tuple[str, list[Case]]:
    """Forward and backward of a core, by core and length."""
    import torch

    from blagpt_pl.nn.base import Heads, Site

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    b, h, g, k = WIDTHS.values()

    def case(name: str, tokens: int) -> Case:
        core = core_named(name, Heads(Site(h * k, 12, 0, 50304, tokens), h, g, k))
        if args.compile is not None:
            core.compile(backend=args.compile, fullgraph=True, dynamic=False)
        dice = torch.Generator(device).manual_seed(0)
        q, key, v, toward = (
            torch.randn(b, n, tokens, k, generator=dice, device=device, dtype=dtype) for n in (h, g, g, h)
        )
        inputs = [x.requires_grad_() for x in (q, key, v)]
        return Case(name, tokens, lambda: torch.autograd.grad(core(*inputs), inputs, toward))

    sizes = ", ".join(f"{letter} {n}" for letter, n in WIDTHS.items())
    how = "eager" if args.compile is None else f"compiled by {args.compile}"
    what = f"attention: forward and backward of one core, {sizes}, {str(dtype).removeprefix('torch.')}, {how}"
    return what, [case(name, tokens) for name in args.cores for tokens in args.lengths]


def attention_options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench attention` alone takes."""
    p.add_argument("--cores", nargs="+", default=["SDPA", "Dilated"], metavar="NAME", help="(SDPA Dilated)")
    p.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        default=[1024, 2048, 4096, 8192],
        metavar="T",
        help="tokens  (1024 2048 4096 8192)",
    )
    p.add_argument("--compile", default=None, metavar="BACKEND", help="compile each core: inductor, ...  (eager)")


BENCHMARKS = {
    "attention": Benchmark("time attention cores against the length of the sequence", attention_options, attention),
}

# ---------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    p = argparse.ArgumentParser(prog="blagpt bench", description="Measure how long things take.", allow_abbrev=False)
    kinds = p.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name, benchmark in BENCHMARKS.items():
        one = kinds.add_parser(
            name, help=benchmark.what, description=benchmark.what.capitalize() + ".", allow_abbrev=False
        )
        benchmark.add(one)
        one.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds that count  (7)")
        one.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them that do not  (2)")
        one.add_argument("--device", default=None, help="cpu, cuda, ...  (cuda where there is one)")
        one.add_argument("--threads", type=int, default=None, metavar="N", help="threads on the CPU  (torch's choice)")
        one.add_argument("--json", type=Path, default=None, metavar="FILE", help="write all numbers here, too")
    return p


def checked(args: argparse.Namespace) -> "torch.device":
    """The device, after everything has been looked at that would fail late.

    Raises:
        ConfigError: an option is out of its range, or names what is not there.
    """
    import torch

    least = {"repeats": 1, "warmup": 0, "threads": 1, "lengths": 1}
    for name, bound in least.items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < bound:
                raise ConfigError(f"--{name}: {number} (expected {bound} or more)")
    for name in ("cores", "lengths"):
        value = getattr(args, name, [])
        if len(set(value)) < len(value):
            raise ConfigError(f"--{name}: {' '.join(map(str, value))} (expected each once)")
    if getattr(args, "compile", None) not in (None, *(known := torch._dynamo.list_backends(exclude_tags=()))):
        raise ConfigError(f"--compile: {args.compile!r} is no backend of torch.compile (expected one of {known})")
    if args.json is not None and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ConfigError(f"--json: {args.json} (expected a file in a folder that exists)")
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if args.threads is not None and device.type != "cpu":
        raise ConfigError(f"--threads: has no effect on {device.type} (expected --device cpu)")
    return device


def main(argv: list[str]) -> None:
    """Measure, and print where it was measured and the table."""
    args = parser().parse_args(argv)
    import torch

    from blagpt_pl.callbacks.record import code_version, hardware

    device = checked(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    what, cases = BENCHMARKS[args.benchmark].cases(args, device)
    rows = rows_of(cases, timed(cases, args.repeats, args.warmup, device))
    header = {
        "what": what,
        "rounds": f"{args.repeats} rounds after {args.warmup} of warm-up, cases in turn",
        "hardware": hardware(device, 1),
        "torch": torch.__version__,
        "code": code_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    print(f"{header['what']}; {header['rounds']}")
    print(f"{header['hardware']}, torch {header['torch']}, blagpt {header['code']}, {header['date']}\n")
    print(table(rows))
    if args.json is not None:
        numbers = {"benchmark": args.benchmark, **header, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(numbers, indent=1) + "\n")
