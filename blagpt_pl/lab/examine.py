"""From the layers of a configuration to the verdicts on its model, and how these are shown; what `blagpt check` runs."""

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict

import torch

from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.tiny import tiny, tiny_model, what_shrank
from blagpt_pl.nn.base import count
from blagpt_pl.testing.certificate import BROKEN, DECLARED, KEPT, NOT_HERE, PROMISES, Verdict, certify, claim
from blagpt_pl.testing.subject import Subject

NAME = max(map(len, PROMISES)) + 2  # columns of a promise's name


def examination(
    words: list[str],
    full_size: bool = False,
    only: Collection[str] | None = None,
    seed: int = 0,
    init_tolerance: float = 0.15,
) -> tuple[dict, Iterator[Verdict]]:
    """What is examined, and the verdicts as they come.

    Args:
        words: the layers of the configuration, as on the command line.
        full_size: keep the configured sizes.
        only: names of the promises to look at; all by default.
        seed: of weights, tokens and noise.
        init_tolerance: how far the first loss may lie from ln V, in nats.

    Raises:
        ConfigError: the configuration is none, or a part refuses the tiny size.
    """
    layers = layers_for(words)
    tree = layers.tree if full_size else tiny(layers.tree)
    torch.manual_seed(seed)
    model = model_of(layers) if full_size else tiny_model(layers)
    model.apply_memory_policy()
    with torch.device("meta"):
        described = count(model_of(layers, tree).parameters())
    threads = None if full_size else 1
    clip = layers.tree.get("trainer", {}).get("gradient_clip_val")
    header = {
        "model": type(model).__name__,
        "parameters": described,
        "size": "the configured size"
        if full_size
        else what_shrank(layers.tree, tree) or "the configured size, which is tiny",
        "seed": seed,
    }
    subject = Subject(model, init_tolerance, None, clip, described, lambda: model_of(layers, tree))
    return header, aside(certify(subject, only, seed, threads))


def broken(found: Sequence[Verdict]) -> list[str]:
    """Names of the promises that were broken."""
    return [v.promise for v in found if v.state == BROKEN]


def aside(verdicts: Iterator[Verdict]) -> Iterator[Verdict]:
    """The same verdicts; what a part prints while it is examined goes to stderr."""
    while True:
        with contextlib.redirect_stdout(sys.stderr):
            verdict = next(verdicts, None)
        if verdict is None:
            return
        yield verdict


def show(verdict: Verdict) -> Verdict:
    """Print a verdict's row at once; on a terminal in red where it is bad news."""
    row = f"{verdict.promise:<{NAME}}{verdict.state:<10}{verdict.found}"
    red = sys.stdout.isatty() and verdict.state == BROKEN
    print(f"\033[31m{row}\033[0m" if red else row, flush=True)
    return verdict


def summary(found: Sequence[Verdict], seconds: float) -> str:
    """The last line: how many promises were kept, which were not."""
    names, states = broken(found), [v.state for v in found]
    parts = [f"{len(names)} BROKEN: {', '.join(names)}"] if names else []
    if set(states) == {KEPT}:
        parts, states = [f"all {len(found)} promises kept" if len(found) > 1 else "1 promise kept"], []
    parts += [f"{states.count(state)} {state}" for state in (KEPT, DECLARED, NOT_HERE) if state in states]
    if "runs" in names:
        parts.append("begin with `runs`, which the others rest on")
    elif "causality" in names and any(v.promise == "gradient causality" and v.state == KEPT for v in found):
        parts.append(
            "no gradient comes from the future: look for statistics over a batch, state, or a path without gradient"
        )
    return f"{'; '.join(parts)} ({seconds:.1f} s)"


def as_json(verdict: Verdict) -> dict:
    """A verdict as plain data, with what the promise says."""
    plain = {k: v for k, v in asdict(verdict).items() if k != "error"}
    return {**plain, "seconds": round(verdict.seconds, 3), "claim": claim(verdict.promise)}


def claims() -> list[str]:
    """A line for each promise: its name and what it says."""
    return [f"{name:<{NAME}}{claim(name)}" for name in PROMISES]
