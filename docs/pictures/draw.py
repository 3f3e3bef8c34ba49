"""Draw a run's TensorBoard scalars as one SVG: `python docs/pictures/draw.py logs/quickstart/0 docs/pictures/quickstart.svg`."""

import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = (
    ("nats", ("train/loss", "val/loss", "val/unigram_loss")),
    ("bits a byte", ("val/bpb", "val/unigram_bpb")),
    ("grad_norm", ("grad_norm",)),
    ("lr", ("lr",)),
    ("perf/step_ms", ("perf/step_ms",)),
    ("perf/tokens_per_s", ("perf/tokens_per_s",)),
)
COLOURS = ("#d95f02", "#1b6ca8", "#888888")
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 300, 190, 52, 30, 14, 26


def ticks(low: float, high: float, n: int = 4) -> list[float]:
    """Round numbers between two values."""
    raw = (high - low) / n or 1.0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def panel(title: str, lines: Sequence[tuple[str, list[tuple[int, float]]]], last_step: int) -> str:
    """One chart: axes, a line for each tag (a dashed level for a single value), and its name."""
    values = [v for _, points in lines for _, v in points]
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = (0.0 if low >= 0 and low - pad < 0 else low - pad), high + pad

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / last_step

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    out = [f'<text x="{LEFT}" y="18" class="t">{escape(title)}</text>']
    for tick in ticks(low, high):
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" class="g"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(0, last_step, 3):
        out.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - 9}" text-anchor="middle">{tick:.0f}</text>')
    for i, (tag, points) in enumerate(lines):
        colour, single = COLOURS[i], len(points) == 1
        path = [(0, points[0][1]), (last_step, points[0][1])] if single else points
        coordinates = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in path)
        dash = ' stroke-dasharray="4 3"' if single else ""
        out.append(f'<polyline points="{coordinates}" fill="none" stroke="{colour}" stroke-width="1.7"{dash}/>')
    if len(lines) > 1:
        names = "&#160; ".join(
            f'<tspan style="fill:{COLOURS[i]}">{escape(tag)}</tspan>' for i, (tag, _) in enumerate(lines)
        )
        out.append(f'<text x="{WIDTH - RIGHT}" y="18" text-anchor="end">{names}</text>')
    return "\n".join(out)


def main(run: str, target: str) -> None:
    """Read the events of a run, write the picture."""
    events = EventAccumulator(run, size_guidance={"scalars": 0})
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    last_step = max(step for points in found.values() for step, _ in points)
    body = []
    for i, (title, tags) in enumerate(PANELS):
        lines = [(tag, found[tag]) for tag in tags if tag in found]
        place = f"translate({i % 3 * WIDTH} {i // 3 * HEIGHT})"
        body.append(f'<g transform="{place}">\n{panel(title, lines, last_step)}\n</g>')
    size = f'viewBox="0 0 {3 * WIDTH} {2 * HEIGHT}" width="{3 * WIDTH}" height="{2 * HEIGHT}"'
    style = "text{font:11px sans-serif;fill:#444}.t{font-size:13px;font-weight:bold;fill:#222}.g{stroke:#e4e4e4}"
    paper = '<rect width="100%" height="100%" fill="#fff"/>'
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{style}</style>\n{paper}\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
    Path(target).write_text(svg)


if __name__ == "__main__":
    main(*sys.argv[1:])
