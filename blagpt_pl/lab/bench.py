"""`blagpt bench`: how long things take (`lab/timing.py` says how that is measured).

A new benchmark is one entry of `BENCHMARKS`: what it takes, and how its cases are made of that.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_attention
from blagpt_pl.lab.timing import Case, rows_of, table, timed

if TYPE_CHECKING:
    import torch


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


BENCHMARKS = {
    "attention": Benchmark(
        "time attention cores against the length of the sequence", bench_attention.options, bench_attention.cases
    ),
}


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
