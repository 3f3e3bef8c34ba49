"""Timing, the same way every time: cases take turns, and the median is reported beside the fastest and the slowest round.

A case is a function without arguments that does the work once. Every round runs each case once, so that a machine that gets
slower or busier does so for all of them alike. The first rounds are not counted (warm-up, compilation).
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

REFERENCE = "SDPA"  # the name that the last column compares with, where it was run


@dataclass(frozen=True)
class Case:
    """One thing to time: what is run, at how many tokens, and the function that does it once."""

    name: str
    tokens: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What came of a case.

    Attributes:
        name, tokens: the case.
        median_ms, fastest_ms, slowest_ms: of the rounds that count.
        times_ms: the rounds.
        to_shortest: median divided by that of the same name with the fewest tokens.
        to_reference: median divided by the reference's with the same tokens, or None where it was not run.
    """

    name: str
    tokens: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    times_ms: list[float]
    to_shortest: float
    to_reference: float | None


def timed(cases: list[Case], repeats: int, warmup: int, device: "torch.device") -> list[list[float]]:
    """Milliseconds of each case, round by round; the cases take turns."""
    import torch
    from tqdm import tqdm

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times: list[list[float]] = [[] for _ in cases]
    total = (warmup + repeats) * len(cases)
    pause_s = 0.1 if sys.stderr.isatty() else 10.0  # between two looks of the bar
    with tqdm(total=total, desc="bench", leave=False, dynamic_ncols=True, mininterval=pause_s) as bar:
        for _ in range(warmup + repeats):
            for case, mine in zip(cases, times, strict=True):
                bar.set_postfix_str(f"{case.name} {case.tokens}", refresh=False)
                wait()
                start = time.perf_counter()
                case.run()
                wait()
                mine.append(1e3 * (time.perf_counter() - start))
                bar.update()
    return [mine[warmup:] for mine in times]


def rows_of(cases: list[Case], times: list[list[float]]) -> list[Row]:
    """The medians, and what they are of one another."""
    median = {(c.name, c.tokens): statistics.median(t) for c, t in zip(cases, times, strict=True)}
    shortest = {c.name: min(other.tokens for other in cases if other.name == c.name) for c in cases}
    return [
        Row(
            name=c.name,
            tokens=c.tokens,
            median_ms=(mine := median[c.name, c.tokens]),
            fastest_ms=min(t),
            slowest_ms=max(t),
            times_ms=t,
            to_shortest=mine / median[c.name, shortest[c.name]],
            to_reference=mine / median[REFERENCE, c.tokens] if (REFERENCE, c.tokens) in median else None,
        )
        for c, t in zip(cases, times, strict=True)
    ]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    head = ["", "tokens", "median ms", "fastest", "slowest", "to shortest", f"to {REFERENCE}"]
    body = [
        [
            r.name, str(r.tokens), *(f"{x:.2f}" for x in (r.median_ms, r.fastest_ms, r.slowest_ms)),
            f"{r.to_shortest:.2f} x", "-" if r.to_reference is None else f"{r.to_reference:.2f} x",
        ]
        for r in rows
    ]  # fmt: skip
    wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide, strict=True))]
        for line in (head, *body)
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(wide)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
