"""`blagpt bench loss`: the next-token loss and its gradients, by implementation, eager and compiled."""

import argparse
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.peak import peak_mib
from blagpt_pl.lab.timing import Case, spread, timed

if TYPE_CHECKING:
    import torch

WHAT = "the next-token loss and its gradients: all logits at once, and in chunks"
SIZES = {"small": (4096, 50304, 96), "full": (65536, 50304, 768)}  # tokens, vocabulary, width
AGAINST = "full, compiled"


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench loss` alone takes."""
    p.add_argument("--tokens", type=int, default=None, metavar="N", help="of a micro-batch  (4096 small, 65536 full)")
    p.add_argument("--vocab", type=int, default=None, metavar="V", help="(50304)")
    p.add_argument("--width", type=int, default=None, metavar="D", help="(96 small, 768 full)")
    p.add_argument("--softcap", type=float, default=None, metavar="C", help="of the logits  (none)")
    p.add_argument("--z-loss", type=float, default=None, metavar="W", help="its weight  (none)")
    p.add_argument("--chunk", type=int, nargs="*", default=[], metavar="N", help="further sizes of a chunk, in tokens")
    p.add_argument("--compile", default="inductor", metavar="BACKEND", help="none: eager only  (%(default)s)")
    p.set_defaults(repeats=5, warmup=1)


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Value and every gradient, by implementation."""
    import torch
    from torch import nn

    from blagpt_pl.losses.choice import KINDS, loss_named
    from blagpt_pl.losses.chunked import Chunked, chunk_of
    from blagpt_pl.losses.z_loss import ZLoss
    from blagpt_pl.nn.base import Site
    from blagpt_pl.nn.head import TiedHead

    tokens, vocabulary, width = (
        default if given is None else given
        for given, default in zip((args.tokens, args.vocab, args.width), SIZES[args.size], strict=True)
    )
    given = [("tokens", tokens), ("vocab", vocabulary), ("width", width), *(("chunk", c) for c in args.chunk)]
    for name, number in given:
        if number < 1:
            raise ConfigError(f"--{name}: {number} (expected 1 or more)")
    site = Site(width, 1, 0, vocabulary, tokens)
    try:
        terms = [] if args.z_loss is None else [ZLoss(site, None, args.z_loss)]
        head = TiedHead(site, nn.Embedding(vocabulary, width), args.softcap).to(device)
    except ValueError as error:
        raise ConfigError(f"--softcap, --z-loss: {error}") from None
    nn.init.normal_(head.weight, std=0.02)
    dice = torch.Generator(device).manual_seed(0)
    features = torch.randn(tokens, width, generator=dice, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), generator=dice, device=device)
    inputs = [features, *head.parameters()]
    notes, losses = [], {}
    for name in KINDS:
        try:
            losses[name] = loss_named(name)
        except ValueError as error:
            notes.append(f"{name}: {error}")
    losses |= {f"chunked by {c}": Chunked(c) for c in args.chunk}
    if device.type != "cuda":
        losses.pop("liger", None)
    forms = {name: losses[name] for name in ("full", "chunked", "liger") if name in losses}
    if args.compile != "none":
        forms |= {f"{name}, compiled": loss.compiled(args.compile) for name, loss in losses.items() if name != "liger"}

    def once(name: str) -> object:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            total, _ = forms[name].parts(head, features, targets, terms)
        return torch.autograd.grad(total, inputs)

    cases = [Case(name, lambda name=name: once(name)) for name in forms]
    times = timed(cases, args.repeats, args.warmup, device)
    rows = [
        {"name": name, **spread(mine), "peak_mib": peak_mib(lambda name=name: once(name), device)}
        for name, mine in zip(forms, times, strict=True)
    ]
    base = next((row for row in rows if row["name"] == AGAINST), rows[0])
    for row in rows:
        row |= {
            "to_base": row["median_ms"] / base["median_ms"],
            "fastest_to_base": row["fastest_ms"] / base["fastest_ms"],
            "memory_to_base": row["peak_mib"] / base["peak_mib"],
        }
    precision = "bf16 autocast" if device.type == "cuda" else "float32"
    extras = "".join(
        f", {name} {value}" for name, value in (("softcap", args.softcap), ("z-loss", args.z_loss)) if value
    )
    columns = (
        Column("name", ""),
        Column("median_ms", "median ms", ",.1f"),
        Column("fastest_ms", "fastest", ",.1f"),
        Column("slowest_ms", "slowest", ",.1f"),
        Column("to_base", f"to {base['name']}", lambda x: f"{x:.2f} x"),
        Column("peak_mib", "peak MiB", ",.0f"),
        Column("memory_to_base", f"to {base['name']}", lambda x: f"{x:.2f} x"),
    )
    return Report(
        f"loss: value and gradients, {tokens} tokens, D {width}, V {vocabulary}{extras}, {precision}, "
        f"chunks of {chunk_of(tokens)}",
        columns,
        rows,
        [*notes, "peak: what was allocated at most beyond inputs and weights, the head's gradient included"],
        lambda figure: bars(figure, rows, "name", [("median_ms", "ms"), ("peak_mib", "peak MiB")]),
    )
