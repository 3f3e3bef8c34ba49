"""The optimizers that are shipped, as a configuration makes them."""

from functools import cache
from pathlib import Path

import torch
from helpers import tiny as tiny_model
from torch import Tensor

from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.lm import LanguageModel
from blagpt_pl.optim.composite import OptimizerFactory

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs/optim").glob("*.yaml"))
NAMES = [file.stem for file in FILES]
# Where a side is longer than a gradient's rank, the eigenvectors of what it has never been in are chosen by rounding, and
# Adam's steps depend on them. So two runs whose sums have another order are compared with short sides alone.
SHORT = ("--model.optimizer.matrix.max_precond_dim", "16")
SURE = {"soap": SHORT, "palm_soap": SHORT}


@cache
def factory(name: str, *words: str) -> OptimizerFactory:
    """What builds the optimizer of an overlay over a model's groups, after further words of a command line."""
    files = [f"{ROOT}/configs/blagpt.yaml", f"{ROOT}/configs/optim/{name}.yaml"]
    tree = layers_for([*(word for file in files for word in ("--config", file)), *words]).tree
    with torch.random.fork_rng():
        return model_of(Layers(tiny(tree))).optimizer_factory


def model(name: str, *words: str, **changes: object) -> LanguageModel:
    """A tiny BlaGPT with the optimizer of an overlay, after further words of a command line."""
    return tiny_model(optimizer=factory(name, *words), **changes)


def bytes_of_text() -> Tensor:
    """Real text: this project's own pages, as bytes."""
    text = b"".join(file.read_bytes() for file in sorted((ROOT / "docs").glob("*.md")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
