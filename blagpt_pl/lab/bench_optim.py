"""`blagpt bench optim`: one step of every optimizer over all parameters of the baseline; two of them the plain way, too.

AdamW    tensor after tensor, by lists (foreach), in one kernel (fused)
Muon     matrix after matrix, by shape, and compiled; of the matrices alone, maps that one matrix stacks taken apart
Others   as their overlays have them; Muon and SOAP for the matrices, fused AdamW for the rest. Of what is done every so many
         steps a step has its share
Ops      what reaches torch's dispatcher in one step, views included; a compiled graph is not seen from outside
State    bytes that the optimizer keeps for each parameter it has
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, timed

if TYPE_CHECKING:
    import torch

WHAT = "one step of every optimizer; of AdamW and Muon the plain way, too"
SIZES = {  # of the baseline's shapes
    "small": {"d_model": 192, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 8192},
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
    dice = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> Parameter:
        p = Parameter(torch.randn(shape, generator=dice, device=device) / d**0.5)
        p.grad = torch.randn(shape, generator=dice, device=device)
        return p

    head_wise = ((h * k, k), (g * k, k), (g * k, 1))  # q and k head by head, v row by row
    blocks = [head_wise, *(((sum(rows), 1),) for rows in maps[1:])]
    gains, biases = [d, d, k, k], [sum(rows) for rows in maps]  # norms and QK-norms
    whole, apart = [((width, width),) for width in gains], [((width, 1),) for width in biases]
    matrices = [made(sum(rows), columns) for _ in range(n) for rows, columns in zip(maps, inputs, strict=True)]
    return [
        {"params": matrices, "role": "matrix", "splits": maps * n, "blocks": blocks * n},
        {"params": [made(v, d)], "role": "embedding", "weight_decay": 0.0, "blocks": [((v, 1),)]},
        {
            "params": [made(width) for _ in range(n) for width in gains + biases] + [made(d)],
            "role": "vector",
            "weight_decay": 0.0,
            "blocks": (whole + apart) * n + [((d, d),)],
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


def kinds_of(backend: str) -> dict[str, Callable]:
    """What makes each optimizer from groups; of names that begin with "Muon" and end otherwise, the matrices alone."""
    import torch

    from blagpt_pl.optim.adam_mini import AdamMini
    from blagpt_pl.optim.adamw_independent import AdamWIndependent
    from blagpt_pl.optim.ademamix import AdEMAMix
    from blagpt_pl.optim.adopt import ADOPT
    from blagpt_pl.optim.c_adamw import CAdamW
    from blagpt_pl.optim.composite import Composite
    from blagpt_pl.optim.demo import DeMo
    from blagpt_pl.optim.mars import MARS
    from blagpt_pl.optim.muon import Muon
    from blagpt_pl.optim.soap import SOAP

    adamw = partial(torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    beside = partial(Composite, other=partial(adamw, fused=True))
    kinds: dict[str, Callable] = {
        "AdamW one by one": partial(adamw, foreach=False, fused=False),
        "AdamW foreach": partial(adamw, foreach=True),
        FUSED: partial(adamw, fused=True),
        "AdamW, independent decay": partial(AdamWIndependent, weight_decay=1e-4, fused=True),
        "RAdam": partial(torch.optim.RAdam, foreach=True),
        "AdEMAMix": AdEMAMix,
        "ADOPT": ADOPT,
        "C-AdamW": CAdamW,
        "Adam-mini": AdamMini,
        "MARS": MARS,
        "DeMo, one rank": DeMo,
        "Muon one by one": one_by_one,
        "Muon by shape": Muon,
        f"Muon compiled by {backend}": partial(Muon, compile=backend),
        "Muon and fused AdamW": partial(beside, matrix=Muon),
        "SOAP and fused AdamW": partial(beside, matrix=SOAP),
        "PaLM SOAP and fused AdamW": partial(beside, matrix=partial(SOAP, palm=True, precondition_frequency=2)),
    }
    if backend == "none":
        del kinds["Muon compiled by none"]
    return kinds


def shared_out(step: Callable[[], object], every: int, device: "torch.device") -> Callable[[], float]:
    """Milliseconds of a step, as the mean of so many."""
    import torch

    def run() -> float:
        start = time.perf_counter()
        for _ in range(every):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start) / every

    return run


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time, operations and state of each."""
    import statistics

    from blagpt_pl.optim.account import state_bytes

    backend = args.compile or ("inductor" if device.type == "cuda" else "none")
    steps, rows = [], []
    for name, kind in kinds_of(backend).items():
        groups = groups_of(args.size, device)
        given = groups[:1] if name.startswith("Muon") and "AdamW" not in name else groups
        made = kind(given)
        step = made if kind is one_by_one else made.step
        step()  # makes the state
        n = sum(p.numel() for group in given for p in group["params"])
        kept = state_bytes(*(made.optimizers if kind is one_by_one else [made]))
        ops = None if "compiled" in name else ops_of(step)
        rows.append({"name": name, "parameters_m": n / 1e6, "ops": ops, "state_bytes": kept / n})
        every = max(group.get("precondition_frequency", 1) for group in given)
        steps.append(Case(name, shared_out(step, every, device), itself=True) if every > 1 else Case(name, step))
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
