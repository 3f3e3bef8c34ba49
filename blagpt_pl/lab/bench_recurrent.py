"""`blagpt bench recurrent`: recurrences as the parts run them, the same step by step, and Hugging Face's, against length.

What     the operators of Mamba-2 (`ssd`), RWKV-7 (`dplr`) and Mamba-1 (`scan`), float32, one sequence, at the sizes of a model of 130 M:
         H 24, P 64, N 128; H 12, K 64; 1536 channels, N 16
Forms    ours: what the parts run, by chunks (`scan` on a CPU: position by position, with gradients written out), and `kernel` where it
         is installed; step by step: the definition, whose backward pass is timed at the shortest length alone; Hugging Face:
         transformers' torch form of Mamba-2 in chunks of 256, its default, and of 64, ours
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, short
from blagpt_pl.lab.timing import Case, spread, timed

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from torch import Tensor

    Operator = Callable[..., tuple[Tensor, Tensor]]

WHAT = "time recurrences: ours, step by step, and Hugging Face's, against the length of the sequence"
OPERATORS = ("ssd", "dplr", "scan")
LENGTHS = {"small": [1024, 2048, 4096, 8192], "full": [1024, 2048, 4096, 8192, 16384]}
OURS, STEPS = "ours", "step by step"
COLUMNS = [
    Column("name", ""),
    Column("tokens", "tokens"),
    Column("forward_ms", "forward ms", ",.1f"),
    Column("both_ms", "and backward ms", ",.1f"),
    Column("tokens_per_s", "tokens/s, forward", ",.0f"),
    Column("forward_ratio", f"forward, to {OURS}", "{:.2f} x".format),
    Column("both_ratio", f"both, to {OURS}", "{:.2f} x".format),
]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench recurrent` alone takes."""
    p.add_argument("--operators", nargs="+", default=list(OPERATORS), metavar="NAME", help=f"({' '.join(OPERATORS)})")
    p.add_argument(
        "--lengths", nargs="+", type=int, default=None, metavar="T", help="tokens  (1024 to 8192; full: to 16384)"
    )
    p.set_defaults(repeats=3, warmup=1)  # a round of steps takes long


# ---------------------------------------------------------------------- the definitions, one position after the other


def ssd_steps(x: "Tensor", log_decay: "Tensor", b: "Tensor", c: "Tensor") -> tuple["Tensor", "Tensor"]:
    """S ← e^a S + x ⊗ b, y = S c: x (1, T, H, P), a (1, T, H), b and c (1, T, 1, N)."""
    import torch

    s, y = x.new_zeros(*x.shape[2:], b.shape[-1]), []  # (H, P, N)
    for xt, at, bt, ct in zip(x[0], log_decay[0], b[0], c[0], strict=True):
        s = at.exp()[:, None, None] * s + xt[..., None] * bt[0]
        y.append(s @ ct[0])
    return torch.stack(y)[None], s[None]


def dplr_steps(
    r: "Tensor", log_w: "Tensor", k: "Tensor", v: "Tensor", a: "Tensor", b: "Tensor"
) -> tuple["Tensor", "Tensor"]:
    """S ← diag(w) S + b (aᵀ S) + k vᵀ, y = Sᵀ r: all (1, T, H, K)."""
    import torch

    s, y = r.new_zeros(*r.shape[2:], v.shape[-1]), []  # (H, K, V)
    for rt, wt, kt, vt, at, bt in zip(*(t[0] for t in (r, log_w, k, v, a, b)), strict=True):
        s = wt.exp()[..., None] * s + bt[..., None] * (at[:, None] @ s) + kt[..., None] * vt[:, None]
        y.append((rt[:, None] @ s)[:, 0])
    return torch.stack(y)[None], s[None]


def scan_steps(x: "Tensor", dt: "Tensor", a: "Tensor", b: "Tensor", c: "Tensor") -> tuple["Tensor", "Tensor"]:
    """h ← e^{dt a} h + dt x b, y = h · c: x and dt (1, T, I), a (I, N), b and c (1, T, N)."""
    import torch

    h, y = torch.zeros_like(a), []  # (I, N)
    for xt, dtt, bt, ct in zip(x[0], dt[0], b[0], c[0], strict=True):
        h = (dtt[:, None] * a).exp() * h + (dtt * xt)[:, None] * bt
        y.append(h @ ct)
    return torch.stack(y)[None], h[None]


# ---------------------------------------------------------------------- forms and inputs


def inputs_of(operator: str, tokens: int, device: "torch.device") -> list["Tensor"]:
    """One sequence's, at the sizes of a model of 130 M; decays as such models start."""
    import torch
    from torch.nn import functional as F

    dice = torch.Generator(device).manual_seed(0)

    def made(*shape: int) -> "Tensor":
        return torch.randn(shape, generator=dice, device=device)

    if operator == "ssd":
        heads = made(1, tokens, 24)
        found = [made(1, tokens, 24, 64), -F.softplus(heads), made(1, tokens, 1, 128), made(1, tokens, 1, 128)]
    elif operator == "dplr":
        r, w, k, v, a, share = (made(1, tokens, 12, 64) for _ in range(6))
        kappa = F.normalize(a, dim=-1)
        found = [r, -0.6 * w.sigmoid(), k, v, -kappa, kappa * share.sigmoid()]
    else:
        x, dt = made(1, tokens, 1536), F.softplus(made(1, tokens, 1536) - 4)
        a = -torch.arange(1.0, 17, device=device).expand(1536, -1)
        found = [x, dt, a.contiguous(), made(1, tokens, 16), made(1, tokens, 16)]
    return [t.requires_grad_() for t in found]


def hugging_face(chunk: int) -> "Operator | None":
    """transformers' Mamba-2 in torch as a function of our inputs, or None where it is not installed."""
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
        from transformers.utils import logging
    except ImportError:
        return None
    logging.set_verbosity_error()  # it says at length that it is slow

    def run(x: "Tensor", log_decay: "Tensor", b: "Tensor", c: "Tensor") -> tuple["Tensor", "Tensor"]:
        """Its x and dt are apart: with A = -1 and dt = -a, what it writes is dt x again ours."""
        dt = -log_decay
        return mamba2_chunk_scan(
            x / dt[..., None], dt, dt.new_full(dt.shape[2:], -1.0), b, c, chunk, return_final_states=True
        )

    return run


def forms_of(operator: str, device: "torch.device") -> dict[str, "Operator"]:
    """The ways to compute an operator here, by name."""
    from blagpt_pl.nn.recurrent import kernels
    from blagpt_pl.nn.recurrent.delta import dplr
    from blagpt_pl.nn.recurrent.selective_scan import selective_scan
    from blagpt_pl.nn.recurrent.ssd import ssd

    ours = {"ssd": ssd, "dplr": dplr, "scan": selective_scan}[operator]
    steps = {"ssd": ssd_steps, "dplr": dplr_steps, "scan": scan_steps}[operator]
    kernel = {"ssd": kernels.ssd, "dplr": kernels.dplr}.get(operator)
    found = {OURS: ours, STEPS: steps}
    if kernel is not None and kernels.available(device):
        found["kernel"] = kernel
    if operator == "ssd":
        theirs = {f"Hugging Face, chunks of {n}": hugging_face(n) for n in (256, 64)}
        found |= {name: run for name, run in theirs.items() if run is not None}
    return found


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time every form of every operator at every length, forward, and forward and backward, in turn.

    Raises:
        ConfigError: an operator that there is not, a length below 1, or one of them twice.
    """
    import torch

    lengths = args.lengths or LENGTHS[args.size]
    if unknown := [name for name in args.operators if name not in OPERATORS]:
        raise ConfigError(f"--operators: {unknown[0]!r} (expected of {', '.join(OPERATORS)})")
    for option, given in (("operators", args.operators), ("lengths", lengths)):
        if len(set(given)) < len(given):
            raise ConfigError(f"--{option}: {' '.join(map(str, given))} (expected each once)")
    if (least := min(lengths)) < 1:
        raise ConfigError(f"--lengths: {least} (expected 1 or more)")
    cases, rows = [], []
    for operator in args.operators:
        for tokens in lengths:
            given = inputs_of(operator, tokens, device)
            for form, run in forms_of(operator, device).items():
                row = {"name": f"{operator}, {form}", "operator": operator, "form": form, "tokens": tokens}
                rows.append(row)
                cases.append((row, "forward", Case(row["name"], partial(_forward, run, given), tokens)))
                if form != STEPS or tokens == least:
                    cases.append((row, "both", Case(row["name"], partial(_both, run, given), tokens)))
    times = timed([case for _, _, case in cases], args.repeats, args.warmup, device)
    for (row, what, _), mine in zip(cases, times, strict=True):
        row |= {f"{what}_{key}": value for key, value in spread(mine).items()}
        row[f"{what}_ms"] = row.pop(f"{what}_median_ms")
    compare(rows)
    what = f"recurrent: one operator, one sequence, float32, {torch.get_num_threads()} threads, eager"
    return Report(what, COLUMNS, rows, growths(rows), lambda figure: draw(figure, rows))


def _forward(run: "Operator", given: list["Tensor"]) -> None:
    import torch

    with torch.no_grad():
        run(*given)


def _both(run: "Operator", given: list["Tensor"]) -> None:
    import torch

    y, _ = run(*given)
    torch.autograd.grad(y.sum(), given)


def compare(rows: list[dict]) -> None:
    """Add tokens a second, and what each form takes of ours of the same operator and length."""
    ours_of = {(row["operator"], row["tokens"]): row for row in rows if row["form"] == OURS}
    for row in rows:
        ours = ours_of[row["operator"], row["tokens"]]
        row["tokens_per_s"] = 1e3 * row["tokens"] / row["forward_ms"]
        row["forward_ratio"] = row["forward_ms"] / ours["forward_ms"]
        row["both_ratio"] = row["both_ms"] / ours["both_ms"] if "both_ms" in row else None


def growths(rows: list[dict]) -> list[str]:
    """For each operator how our form's time grows with the length."""
    from blagpt_pl.lab.bench_scaling import exponent

    said = []
    for operator in dict.fromkeys(row["operator"] for row in rows):
        mine = [row for row in rows if row["operator"] == operator and row["form"] == OURS]
        a = exponent([row["tokens"] for row in mine], [row["both_ms"] for row in mine])
        if a is not None:
            said.append(f"Fit: {operator} of ours, forward and backward ~ T^{a:.2f} ({len(mine)} lengths).")
    return said


def draw(figure: "Figure", rows: list[dict]) -> None:
    """A column of panels for each operator: forward above, forward and backward below, a line for each form."""
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    figure.set_size_inches(0.8 + 3.3 * len(operators), 5.4)
    for column, operator in zip(figure.subplots(2, len(operators), squeeze=False).T, operators, strict=True):
        mine = [row for row in rows if row["operator"] == operator]
        for ax, key, title in zip(column, ("forward_ms", "both_ms"), ("forward", "and backward"), strict=True):
            for form in dict.fromkeys(row["form"] for row in mine):
                points = [(row["tokens"], row[key]) for row in mine if row["form"] == form and key in row]
                ax.plot(*zip(*points, strict=True), marker="o", markersize=4, label=form)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: short(value))
            ax.yaxis.set_major_formatter(lambda value, _: short(value))
            ax.yaxis.set_minor_formatter(lambda value, _: "")
            ax.set_title(f"{operator}, {title}, ms", fontsize=9)
            ax.grid(color="#dddddd", linewidth=0.6)
            ax.set_axisbelow(True)
        low, high = column[0].get_ylim()
        column[0].set_ylim(low, high * (high / low) ** 0.45)  # room for the names
        column[0].legend(frameon=False, fontsize=7, loc="upper left")
        column[1].set_xlabel("tokens")
