"""The table of docs/optimizers.md, from the overlays of configs/optim, what they build, and the heads of the pages here.

    python docs/optim/table.py    writes it; a test says when it is old

State: bytes per parameter over all 142,570,752 of the baseline, after two steps in float32 on tensors without data. The rule and what
the seed claims come from the table at the head of each page.
"""

import re
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.optim.account import groups_told, state_bytes
from blagpt_pl.optim.composite import Composite

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/optimizers.md"
BEGIN, END = "<!-- from here on: python docs/optim/table.py -->", "<!-- up to here -->"
HEAD = ("optimizer", "rule", "learning rate", "state, bytes a parameter", "class", "the seed claims")


def told(name: str, row: str) -> str:
    """A row of the table at the head of an optimizer's page."""
    text = (ROOT / f"docs/optim/{name}.md").read_text()
    found = re.search(rf"^\| {row} \| (.+) \|$", text, re.MULTILINE)
    if not found:
        raise SystemExit(f"docs/optim/{name}.md: no row `| {row} | ... |` in the table at its head")
    return found[1]


def library(optimizer: torch.optim.Optimizer) -> str:
    """Where a class comes from; of a Composite, where its two members do."""
    if isinstance(optimizer, Composite):
        return ", ".join(dict.fromkeys(library(member) for member in optimizer.members.values()))
    root, name = type(optimizer).__module__.split(".")[0], type(optimizer).__name__
    return {"blagpt_pl": f"`{name}`", "torch": f"`torch.optim.{name}`"}.get(root, f"`{root}.{name}`")


def line(name: str) -> str:
    """The row of an overlay."""
    tree = layers_for(["--config", f"{ROOT}/configs/blagpt.yaml", "--config", f"{ROOT}/configs/optim/{name}.yaml"]).tree
    with FakeTensorMode():
        model = model_of(Layers(tree))
        optimizer = model.make_optimizer()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()  # some keep nothing before their second
    rates: dict[float, str] = {}
    for group in groups_told(optimizer):
        rates.setdefault(group["lr"], group["role"])
    rate = ", ".join(f"{lr:g} ({role})" for lr, role in rates.items()) if len(rates) > 1 else f"{next(iter(rates)):g}"
    size = state_bytes(optimizer) / sum(p.numel() for p in model.parameters())
    title = (ROOT / f"docs/optim/{name}.md").read_text().splitlines()[0].removeprefix("# ")
    seed = told(name, "The seed claims")
    cells = f"[{title}](optim/{name}.md)", told(name, "Rule"), rate, f"{size:.1f}", library(optimizer), seed
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole of it."""
    names = sorted(file.stem for file in (ROOT / "configs/optim").glob("*.yaml"))
    rows = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*rows, *map(line, names)])


def written(text: str) -> str:
    """A page with the table in its place."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
