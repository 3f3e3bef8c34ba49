"""`blagpt bench overhead`: what the framework costs a step, beside what is computed (`lab/null_run.py` says how)."""

import argparse
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, spread, timed

if TYPE_CHECKING:
    import torch

WHAT = "what a Trainer costs a step: a model that computes next to nothing, against a bare loop"
STEPS = {
    "small": (300, 20),
    "full": (400, 60),
}  # of a round: of the null model, of the busy one; multiples of a log interval
BUSY = ("bare loop", "blagpt fit, default flags", "Lightning, default flags, self.log(prog_bar=True)")
COLUMNS = [
    Column("name", ""),
    Column("median_us", "CPU us a step", ",.0f"),
    Column("overhead_us", "over bare, us", ",.0f"),
    Column("ratio", "to bare", ".2f"),
    Column("calls", "Python calls a step", ",.0f"),
    Column("busy_us", "CPU us beside a busy step", ",.0f"),
    Column("busy_ratio", "to bare, busy step", ".4f"),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench overhead` alone takes."""
    p.add_argument("--busy-ms", type=float, default=30.0, metavar="MS", help="of the busy step  (30)")
    p.set_defaults(repeats=5, warmup=1)


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Run each loop, in turn.

    Raises:
        ConfigError: an option is out of its range.
    """
    if not args.busy_ms > 0:
        raise ConfigError(f"--busy-ms: {args.busy_ms} (expected more than 0)")
    from blagpt_pl.lab import null_run
    from blagpt_pl.lab.quiet import quiet

    quiet()
    runs = null_run.RUNS
    many, few = STEPS[args.size]
    cases = [Case(name, partial(null_run.cpu_ms, run, device, many), itself=True) for name, run in runs.items()]
    busy = [
        Case(f"{name}, busy", partial(null_run.cpu_ms, runs[name], device, few, args.busy_ms), itself=True)
        for name in BUSY
    ]
    times = timed([*cases, *busy], args.repeats, args.warmup, device)
    rows = [{"name": case.name, **spread(t)} for case, t in zip(cases, times, strict=False)]
    bare = rows[0]["median_ms"]
    waited = {name: spread(t) for name, t in zip(BUSY, times[len(cases) :], strict=True)}
    for row in rows:
        row["median_us"] = 1e3 * row["median_ms"]
        row["overhead_us"] = 1e3 * (row["median_ms"] - bare)
        row["ratio"] = row["median_ms"] / bare
        row["calls"] = null_run.calls_a_step(runs[row["name"]], device)
        if row["name"] in waited:
            beside = waited[row["name"]]
            row["busy_us"], row["busy_times_ms"] = 1e3 * beside["median_ms"], beside["times_ms"]
            row["busy_ratio"] = (args.busy_ms + beside["median_ms"]) / (args.busy_ms + waited[BUSY[0]]["median_ms"])
    panels = [("overhead_us", "CPU us a step over bare"), ("calls", "Python calls a step")]
    return Report(
        f"overhead: one weight, AdamW, a schedule; {many} steps a round, log points included",
        COLUMNS,
        rows,
        [
            "CPU time of the process, all threads; each Trainer logs as often as its defaults say (ours: every 10 steps).",
            f"Busy step: the objective uses {args.busy_ms:g} ms of CPU time, which hides nothing and leaves the caches cold; {few} steps a round.",
        ],
        partial(bars, rows=rows, label="name", panels=panels),
    )
