"""`blagpt bench optim`: one step of an optimizer over all parameters of the baseline, each made the plain way and the fast one.

AdamW    tensor after tensor, by lists (foreach), in one kernel (fused)
Muon     matrix after matrix, by shape, and compiled; of the matrices alone, maps that one matrix stacks taken apart
Both     Composite: Muon for the matrices, fused AdamW for the rest
Ops      what reaches torch's dispatcher in one step, views included; a compiled graph is not seen from outside
State    bytes that the optimizer keeps for each parameter it has
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch

WHAT = "one step of an optimizer: AdamW and Muon, made the plain way and the fast one"
SIZES = {  # of the baseline's shapes
    "small": {"d_model": 256, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 8192},
    "full": {"d_model": 768, "layers": 12, "heads": 12, "kv_heads": 4, "vocab": 50304},
}
COLUMNS = [
    Column("name", "optimizer"),
    Column("parameters_m", "parameters M", ",.1f"),
    Column("median_ms", "ms", ",.2f"),
    Column("to_fused", "to fused AdamW", ",.2f"),
    Column("ops", "ops", ",d"),
    Column("state_bytes", "state B/parameter", ",.2f"),
]
FUSED = "AdamW fused"


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench optim` alone takes."""
    p.add_argument(
        "--compile",
        default=None,
        metavar="BACKEND",
        help="of compiled Muon, or none  (inductor on CUDA, none on a CPU)",
    )
    p.set_defaults(repeats=5, warmup=1)


def groups_of(size: str, device: "torch.device") -> list[dict]:
    """New parameters of the baseline's shapes with random gradients, in groups as a model makes them."""
    import torch
    from torch.nn import Parameter

    d, n, h, g, v = SIZES[size].values()
    k, f = d // h, 4 * d
    maps = [(h * k, g * k, g * k), (d,), (f, f), (d,)]  # rows of qkv, out, gate and up, down
    inputs = [d, h * k, d, f]
    vectors = [d, d, k, k, *(sum(rows) for rows in maps)]  # norms, QK-norms, biases
    dice = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> Parameter:
        p = Parameter(torch.randn(shape, generator=dice, device=device) / d**0.5)
        p.grad = torch.randn(shape, generator=dice, device=device)
        return p

    matrices = [made(sum(rows), columns) for _ in range(n) for rows, columns in zip(maps, inputs, strict=True)]
    return [
        {"params": matrices, "role": "matrix", "splits": maps * n},
        {"params": [made(v, d)], "role": "embedding", "weight_decay": 0.0},
        {
            "params": [made(width) for _ in range(n) for width in vectors] + [made(d)],
            "role": "vector",
            "weight_decay": 0.0,
        },
    ]


def one_by_one(groups: list[dict], **values: float) -> Callable[[], None]:
    """Muon as a loop over maps, each its own little step: what batching is compared with."""
    import torch

    from blagpt_pl.optim.muon import Muon

    apart = []
    for group in groups:
        for p, rows in zip(group["params"], group["splits"], strict=True):
            for piece, grad in zip(p.detach().split(rows), p.grad.split(rows), strict=True):
                view = torch.nn.Parameter(piece)
                view.grad = grad
                apart.append(view)
    optimizers = [Muon([view], **values) for view in apart]

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    step.optimizers = optimizers
    return step


def ops_of(step: Callable[[], object]) -> int:
    """What a step hands to the dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(
            self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            self.n += 1
            return func(*args, **(kwargs or {}))

    with Count() as count:
        step()
    return count.n


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time, operations and state of each."""
    import statistics

    import torch

    from blagpt_pl.optim.account import state_bytes
    from blagpt_pl.optim.composite import Composite
    from blagpt_pl.optim.muon import Muon

    adamw = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    backend = args.compile or ("inductor" if device.type == "cuda" else "none")
    kinds: dict[str, Callable] = {
        "AdamW one by one": partial(adamw, foreach=False, fused=False),
        "AdamW foreach": partial(adamw, foreach=True),
        FUSED: partial(adamw, fused=True),
        "Muon one by one": one_by_one,
        "Muon by shape": Muon,
        f"Muon compiled by {backend}": partial(Muon, compile=backend),
        "Muon and fused AdamW": partial(Composite, matrix=Muon, other=partial(adamw, fused=True)),
    }
    if backend == "none":
        del kinds["Muon compiled by none"]
    steps, rows = [], []
    for name, kind in kinds.items():
        groups = groups_of(args.size, device)
        given = groups[:1] if name.startswith("Muon") and "AdamW" not in name else groups
        made = kind(given)
        step = made if kind is one_by_one else made.step
        step()  # makes the state
        n = sum(p.numel() for group in given for p in group["params"])
        kept = state_bytes(*(made.optimizers if kind is one_by_one else [made]))
        ops = None if "compiled" in name else ops_of(step)
        rows.append({"name": name, "parameters_m": n / 1e6, "ops": ops, "state_bytes": kept / n})
        steps.append(Case(name, step))
    times = timed(steps, args.repeats, args.warmup, device)
    median = {case.name: statistics.median(mine) for case, mine in zip(steps, times, strict=True)}
    for row, mine in zip(rows, times, strict=True):
        name = row["name"]
        row |= {"median_ms": median[name], "to_fused": median[name] / median[FUSED], "times_ms": mine}
    sizes = ", ".join(f"{key} {value}" for key, value in SIZES[args.size].items())
    ratios = {
        f"{FUSED} to AdamW one by one": median[FUSED] / median["AdamW one by one"],
        "Muon by shape to Muon one by one": median["Muon by shape"] / median["Muon one by one"],
    }
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return Report(
        what=f"optim: one step, parameters and gradients in float32, Muon's products in {precision}; {sizes}",
        columns=COLUMNS,
        rows=rows,
        notes=[f"{name}: {ratio:.3f}" for name, ratio in ratios.items()],
        draw=lambda figure: bars(
            figure, rows, "name", [("median_ms", "ms a step"), ("state_bytes", "bytes a parameter")]
        ),
    )
