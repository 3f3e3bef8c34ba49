"""`blagpt bench compile`: the first step of a run, block by block or as one graph, before and after torch has a cache.

Each row is a process of its own. `cold` starts with an empty cache folder (TORCHINDUCTOR_CACHE_DIR), `cached` with the one
that `cold` has filled; what the system's C++ compiler keeps of headers in memory is the same for all after the first.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import spread

if TYPE_CHECKING:
    import torch

WHAT = "the first step: eager, compiled block by block, as one graph; with and without torch's cache"
LAYERS = True
FORMS = {"eager": None, "block by block": False, "one graph": True}  # whole_graph
CHILD = "import sys; from blagpt_pl.lab.bench_compile import child; child(sys.argv[1])"


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench compile` alone takes."""
    p.usage = "blagpt bench compile --config FILE [--config FILE ...] [--key value ...] [options]"
    p.add_argument("--compile", default="inductor", metavar="BACKEND", help="(%(default)s)")
    p.set_defaults(repeats=5, warmup=1)


def child(request: str) -> None:
    """One process: take a first step and some more, print what they took."""
    import torch

    from blagpt_pl.callbacks.first_step import counted
    from blagpt_pl.lab import stepper
    from blagpt_pl.lab.quiet import quiet
    from blagpt_pl.lab.timing import Case, timed

    quiet()
    asked = json.loads(request)
    device = torch.device(asked["device"])
    if asked["threads"] is not None:
        torch.set_num_threads(asked["threads"])
    name, layers = stepper.one_configuration(asked["words"])
    tree = stepper.compiled_by(stepper.small(layers.tree) if asked["small"] else layers.tree, asked["compile"])
    batch, precision = (
        stepper.batch_of(tree, 1024 if asked["small"] else None),
        stepper.precision_of(layers, asked["small"]),
    )
    if asked["whole"]:
        tree["model"]["init_args"]["whole_graph"] = True
    one = stepper.of_configuration(name, layers, tree, device, batch, precision)
    (times,) = timed([Case(name, one.step)], asked["repeats"], asked["warmup"], device)
    print(json.dumps({"first_s": one.first_s, **spread(times), **counted()}))


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Every form, cold and cached.

    Raises:
        ConfigError: the configuration is wrong, or a process failed.
    """
    from blagpt_pl.lab import stepper

    name, _ = stepper.one_configuration(args.layers)
    if args.compile == "none":
        raise ConfigError("--compile: none (expected a backend of torch.compile)")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form, whole in FORMS.items():
            for state in ("cold", "cached") if whole is not None else ("",):
                asked = {
                    "words": args.layers, "device": str(device), "threads": args.threads, "small": args.size == "small",
                    "compile": args.compile if whole is not None else "none", "whole": bool(whole),
                    "repeats": args.repeats, "warmup": args.warmup,
                }  # fmt: skip
                cache = {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / form.replace(" ", "_"))}
                rows.append({"name": form, "cache": state or "-", **_run(asked, cache)})
    by_block = next(row for row in rows if row["name"] == "block by block")
    for row in rows:
        row["to_block"] = row["first_s"] / by_block["first_s"]
        row["step_to_eager"] = row["median_ms"] / rows[0]["median_ms"]
        row["label"] = f"{row['name']} {row['cache'].strip('-')}".strip()
    columns = (
        Column("name", ""),
        Column("cache", "cache"),
        Column("first_s", "first step s", ",.1f"),
        Column("to_block", "to by block, cold", lambda x: f"{x:.2f} x"),
        Column("graphs", "graphs"),
        Column("kernels_compiled", "pieces compiled"),
        Column("kernels_cached", "from the cache"),
        Column("median_ms", "later steps, ms", ",.1f"),
        Column("step_to_eager", "to eager", lambda x: f"{x:.2f} x"),
    )
    size = "made small (width <= 192, 4 blocks, V <= 8192; float32)" if args.size == "small" else "as configured"
    return Report(
        f"compile: {name or 'the configuration'} {size}, {args.compile}",
        columns,
        rows,
        ["A process each; graphs of training alone. A piece is the forward or the backward half of a graph."],
        partial(
            bars, rows=rows, label="label", panels=[("first_s", "first step, s"), ("median_ms", "later steps, ms")]
        ),
    )


def _run(asked: dict, environment: dict[str, str]) -> dict:
    words = [sys.executable, "-c", CHILD, json.dumps(asked)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"bench compile: a process of it left with {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
