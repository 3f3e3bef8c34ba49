"""`blagpt bench`: how long things take, and how much memory (`lab/timing.py` and `lab/peak.py` say how that is measured).

A benchmark is a module `lab/bench_<kind>.py` with `WHAT`, `options(parser)` and `measure(args, device) -> Report`; a new
one is one more word in `KINDS`. One that says `LAYERS = True` takes configuration layers, too: the words that no option
explains are `args.layers`.
"""

import argparse
import importlib
import json
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from blagpt_pl.lab.bench_report import Report

KINDS = (
    "step",
    "peers",
    "overhead",
    "loader",
    "loss",
    "scaling",
    "optim",
    "memory",
    "compile",
    "attention",
    "recurrent",
)
LEAST = {"repeats": 1, "warmup": 0, "threads": 1}


def module_of(kind: str) -> ModuleType:
    """The module of a benchmark."""
    return importlib.import_module(f"blagpt_pl.lab.bench_{kind}")


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    p = argparse.ArgumentParser(prog="blagpt bench", description="Measure time and memory.", allow_abbrev=False)
    names = p.add_subparsers(dest="benchmark", required=True, metavar="benchmark")
    for name in KINDS:
        what = module_of(name).WHAT
        text = what[0].upper() + what[1:] + "."
        one = names.add_parser(name, help=what, description=text, allow_abbrev=False)
        common = one.add_argument_group("every benchmark")
        common.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds that count  (%(default)s)")
        common.add_argument("--warmup", type=int, default=2, metavar="N", help="rounds before them  (%(default)s)")
        common.add_argument("--device", default=None, help="cpu, cuda, ...  (cuda where there is one)")
        common.add_argument("--threads", type=int, default=None, metavar="N", help="of the CPU  (torch's choice)")
        common.add_argument(
            "--size", choices=("small", "full"), default=None, help="(small on a CPU, full on an accelerator)"
        )
        common.add_argument(
            "--out",
            type=Path,
            default=Path("logs/bench"),
            metavar="FOLDER",
            help="for table, JSON, picture  (%(default)s)",
        )
        module_of(name).options(one)
    return p


def checked(args: argparse.Namespace) -> "torch.device":
    """The device, after everything has been looked at that would fail late; `args.size` is decided.

    Raises:
        ConfigError: an option is out of its range, or names what is not there.
    """
    import torch

    for name, bound in LEAST.items():
        number = getattr(args, name)
        if number is not None and number < bound:
            raise ConfigError(f"--{name}: {number} (expected {bound} or more)")
    if (backend := getattr(args, "compile", None)) not in (None, "none"):
        known = torch._dynamo.list_backends(exclude_tags=())
        if backend not in known:
            raise ConfigError(f"--compile: {backend!r} is no backend of torch.compile (expected one of {known})")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {args.out}: {error.strerror} (expected a folder, or room for one)") from None
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device: {args.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    if args.threads is not None and device.type != "cpu":
        raise ConfigError(f"--threads: has no effect on {device.type} (expected --device cpu)")
    args.size = args.size or ("small" if device.type == "cpu" else "full")
    return device


def header(args: argparse.Namespace, device: "torch.device") -> dict[str, str]:
    """How often, where, with what and when."""
    import torch

    from blagpt_pl.callbacks.record import code_version, hardware

    return {
        "rounds": f"{args.repeats} rounds after {args.warmup} of warm-up, cases in turn",
        "hardware": hardware(device, 1),
        "torch": torch.__version__,
        "code": code_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def text(report: "Report", head: dict[str, str]) -> str:
    """What is printed, and stands in the Markdown file."""
    where = f"{head['hardware']}, torch {head['torch']}, blagpt {head['code']}, {head['date']}"
    notes = "".join(f"\n{note}" for note in report.notes)
    return f"{report.what}; {head['rounds']}\n{where}\n\n{report.table()}\n{notes}".rstrip() + "\n"


def written(report: "Report", head: dict[str, str], kind: str, folder: Path) -> list[Path]:
    """Write the table, the numbers and the picture; where they are."""
    paths = [folder / f"{kind}.md", folder / f"{kind}.json"]
    numbers = {"benchmark": kind, "what": report.what, **head, "notes": list(report.notes), "rows": report.rows}
    paths[1].write_text(json.dumps(numbers, indent=1) + "\n")
    picture = ""
    if report.draw is not None:
        paths.append(folder / f"{kind}.svg")
        report.picture(paths[-1])
        picture = f"\n![{kind}]({kind}.svg)\n"
    paths[0].write_text(text(report, head) + picture)
    return paths


def main(argv: list[str]) -> None:
    """Measure; print where it was measured, and the table; write both down."""
    p = parser()
    args, args.layers = p.parse_known_args(argv)
    if args.layers and not getattr(module_of(args.benchmark), "LAYERS", False):
        p.error(f"unrecognized arguments: {' '.join(args.layers)}")
    import torch

    device = checked(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = module_of(args.benchmark).measure(args, device)
    head = header(args, device)
    print(text(report, head))
    print("written to", ", ".join(map(str, written(report, head, args.benchmark, args.out))))
