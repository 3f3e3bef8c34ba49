"""`blagpt bench peers`: the same shapes in our module, through our Trainer, and in other people's libraries."""

import argparse
from functools import partial
from textwrap import shorten
from typing import TYPE_CHECKING

from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch

WHAT = "a training step of the same shapes in blagpt, Hugging Face, litgpt and x-transformers"
STEPS = {"small": 4, "full": 20}  # of a fit that is timed
TRAINER = "blagpt, Trainer"
COLUMNS = [
    Column("style", "shape"),
    Column("name", "model"),
    Column("parameters_m", "parameters M", ",.2f"),
    Column("median_ms", "ms", ",.1f"),
    Column("tokens_per_s", "tokens/s", ",.0f"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("first_s", "first step s", ",.1f"),
    Column("ratio", "time to blagpt's", ".3f"),
    Column("peak_ratio", "memory to blagpt's", ".3f"),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench peers` alone takes."""
    p.add_argument(
        "--compile", default=None, metavar="BACKEND", help="inductor, ..., or none  (small: none; full: inductor)"
    )
    p.add_argument("--precision", default=None, help="(small: 32-true; full: bf16-mixed)")
    p.set_defaults(repeats=5, warmup=1)


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time a step of each, in turn."""
    import torch

    from blagpt_pl.lab import peers, stepper
    from blagpt_pl.lab.quiet import quiet

    quiet()
    shape = peers.SHAPES[args.size]
    backend = args.compile or ("none" if args.size == "small" else "inductor")
    backend = None if backend == "none" else backend
    precision = args.precision or ("32-true" if args.size == "small" else "bf16-mixed")
    plugin = stepper.precision_plugin(precision, device)
    batch = stepper.random_batch(shape.vocab_size, shape.batch, shape.context, device)

    def start(peer: peers.Peer) -> stepper.Stepper:
        torch.manual_seed(0)
        module, loss = peer.build(shape, device, backend)
        optimizer = torch.optim.AdamW(plugin.convert_module(module).parameters(), **peers.ADAMW)
        return stepper.started(peer.name, module, loss, optimizer, batch, plugin.train_step_context)

    steps, rows, cases, notes = STEPS[args.size], [], [], []
    with stepper.many_graphs():
        for peer in peers.PEERS:
            row = {"style": peer.style, "name": peer.name}
            rows.append(row)
            if why := peer.missing():
                notes.append(why)
                continue
            try:
                one = start(peer)
            except Exception as error:
                if peer.package is None:
                    raise
                notes.append(f"{peer.name}: does not train here ({type(error).__name__}: {shorten(str(error), 200)})")
                continue
            row["stepper"] = one
            cases.append((row, Case(peer.name, one.step, one.tokens)))
        row = {"style": "llama", "name": TRAINER, "stepper": rows[0]["stepper"]}
        rows.insert(1, row)
        fit = partial(peers.through_trainer, shape, device, backend, precision, steps)
        cases.insert(1, (row, Case(TRAINER, lambda: fit().ms_per_step, itself=True)))
        times = timed([case for _, case in cases], args.repeats, args.warmup, device)
    for (row, _), mine in zip(cases, times, strict=True):
        row |= {**row.pop("stepper").numbers(mine, device), "name": row["name"]}
        row["parameters_m"] = row["parameters"] / 1e6
        if row["name"] == TRAINER:
            row["peak_mib"] = row["first_s"] = None
    for row in rows:
        ours = next(r for r in rows if r["style"] == row["style"] and r["name"] == peers.OURS)
        if "median_ms" in row:
            row["ratio"] = row["median_ms"] / ours["median_ms"]
            row["peak_ratio"] = row["peak_mib"] and row["peak_mib"] / ours["peak_mib"]
        row["label"] = f"{row['name']} ({row['style']})"
    sizes = (
        f"D {shape.d_model}, {shape.n_layers} blocks, H {shape.n_heads}, V {shape.vocab_size}, "
        f"T {shape.context}, B {shape.batch}"
    )
    how = "eager" if backend is None else f"compiled by {backend} (blagpt: its regions; others: the whole module)"
    return Report(
        f"peers: a training step, {sizes}, {precision}, fused AdamW, {how}",
        COLUMNS,
        rows,
        [
            *notes,
            "Compared is within a shape. One random batch for all, the same B T targets; only the Trainer reads shards.",
            f"{TRAINER}: `blagpt fit` with its callbacks, {steps} steps from the end of the first to the end of the last.",
        ],
        partial(bars, rows=rows, label="label", panels=[("median_ms", "ms a step"), ("peak_mib", "peak memory, MiB")]),
    )
