"""Draw where a step's FLOPs, time and memory go: `python docs/pictures/breakdown.py [CONFIG] [OUT]`.

Everything is `blagpt describe`'s: FLOPs are counted, memory is followed without a device, time is predicted for an H200.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blagpt_pl.devices import device_named
from blagpt_pl.lab.account import Account
from blagpt_pl.lab.bench_report import FIRST, OTHERS, STYLE
from blagpt_pl.lab.model_of import layers_for

MIB = 2**20
POLICIES = {
    "none": [],
    "Budget(0.9)": ["--config", "configs/memory/budget.yaml"],
    "Budget(0.5)": ["--config", "configs/memory/budget.yaml", "--model.memory.fraction", "0.5"],
    "RecomputeBlocks": ["--config", "configs/memory/checkpoint.yaml"],
}
CATEGORIES = ("weights", "gradients", "optimizer", "casts", "activations", "logits", "temporaries")
COLOURS = (FIRST, *OTHERS)


def account(config: str, batch: int, *words: str) -> Account:
    """The account of a configuration at this many sequences a forward."""
    layers = layers_for(["--config", config, *words, "--data.device_batch_size", str(batch)])
    return Account(layers, device_named("H200"))


def stacked(ax: Axes, bars: Mapping[str, Mapping[str, float]], unit: str) -> None:
    """Horizontal bars made of parts, with the total at the end."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    for place, bar in enumerate(bars.values()):
        left = 0.0
        for part, value in bar.items():
            ax.barh(place, value, left=left, color=COLOURS[parts.index(part) % len(COLOURS)], height=0.66)
            left += value
        ax.text(left, place, f" {left:,.1f} {unit}", va="center", fontsize=8)
    ax.set_yticks(range(len(bars)), list(bars))
    ax.invert_yaxis()
    ax.margins(x=0.24)
    ax.tick_params(axis="y", length=0)
    ax.xaxis.set_visible(False)
    ax.spines["bottom"].set_visible(False)
    handles = [matplotlib.patches.Patch(color=COLOURS[i % len(COLOURS)]) for i in range(len(parts))]
    ax.legend(handles, parts, ncols=4, frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.02))


def flops(one: Account) -> dict[str, float]:
    """MFLOP a token, by what does them."""
    core = one.attention_flops / 1e6
    of = {"MLP": 0.0, "attention, projections": 0.0, "head": 0.0}
    for side in (one.flops.forward, one.flops.backward):
        for path, n in side.items():
            kind = "MLP" if ".mlp" in path else "head" if path.startswith("head") else "attention, projections"
            of[kind] += n / one.flops.tokens / 1e6
    of["attention, projections"] -= core
    return {**of, "attention, core": core}


def memory(one: Account) -> dict[str, float]:
    """GiB at the worst instant, by category."""
    facts = {fact.name: fact.value for fact in one.facts() if fact.section == "memory of a step"}
    return {name: facts[name] / MIB / 1024 for name in CATEGORIES if facts.get(name)}


def main(config: str = "configs/best.yaml", out: str = "docs/pictures/breakdown.svg") -> None:
    """Draw it."""
    ones = {f"{b} x 1024, {name}": account(config, b, *words) for b in (32, 64) for name, words in POLICIES.items()}
    first = next(iter(ones.values()))
    times = {f"{b} x 1024": account(config, b).prediction.parts_ms for b in (32, 64)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 7.2), layout="constrained")
        top, middle, bottom = figure.subplots(3, 1, height_ratios=(1.2, 2, 6))
        stacked(top, {"a token": flops(first)}, "MFLOP")
        top.set_title("FLOPs, forward and backward (counted)", fontsize=9, loc="left")
        stacked(middle, {name: {k: v for k, v in parts.items() if v} for name, parts in times.items()}, "ms")
        middle.set_title("time of 524,288 tokens on one H200 (predicted, not measured)", fontsize=9, loc="left")
        stacked(bottom, {name: memory(one) for name, one in ones.items()}, "GiB")
        bottom.set_title("memory at the worst instant of a step (followed without a device)", fontsize=9, loc="left")
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = Path(out).read_text().splitlines()
    Path(out).write_text("\n".join(line.rstrip() for line in text) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
