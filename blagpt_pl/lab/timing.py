"""Timing, the same way every time: cases take turns, and the median is reported beside the fastest and the slowest round.

A case is a function without arguments that does the work once. Every round runs each case once, so that a machine that gets
slower or busier does so for all of them alike. The first rounds are not counted (warm-up, compilation).
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One thing to time.

    Attributes:
        name: what it is called in the table.
        run: does the work once.
        tokens: what it is plotted against, where that is a number of tokens.
        itself: whether `run` returns the milliseconds, as one does that prepares something before what it times.
    """

    name: str
    run: Callable[[], object]
    tokens: int = 0
    itself: bool = False


def timed(cases: Sequence[Case], repeats: int, warmup: int, device: "torch.device") -> list[list[float]]:
    """Milliseconds of each case, round by round; the cases take turns."""
    import torch
    from tqdm import tqdm

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def once(case: Case) -> float:
        if case.itself:
            return float(case.run())
        wait()
        start = time.perf_counter()
        case.run()
        wait()
        return 1e3 * (time.perf_counter() - start)

    times: list[list[float]] = [[] for _ in cases]
    total = (warmup + repeats) * len(cases)
    pause_s = 0.1 if sys.stderr.isatty() else 10.0  # between two looks of the bar
    with tqdm(total=total, desc="bench", leave=False, dynamic_ncols=True, mininterval=pause_s) as bar:
        for _ in range(warmup + repeats):
            for case, mine in zip(cases, times, strict=True):
                bar.set_postfix_str(f"{case.name} {case.tokens or ''}".rstrip(), refresh=False)
                mine.append(once(case))
                bar.update()
    return [mine[warmup:] for mine in times]


def spread(times_ms: Sequence[float]) -> dict[str, float | list[float]]:
    """What a row says of the rounds of a case: median, fastest and slowest, and all of them."""
    return {
        "median_ms": statistics.median(times_ms),
        "fastest_ms": min(times_ms),
        "slowest_ms": max(times_ms),
        "times_ms": list(times_ms),
    }
