"""What a shipped configuration builds, at its full size and without memory."""

from pathlib import Path

import torch

from blagpt_pl.lab import parts
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.train import BlagptCLI

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
BASELINE = CONFIGS / "blagpt.yaml"
MODELS = {file.stem: file for file in sorted((CONFIGS / "models").glob("*.yaml"))}


def built(name: str, *words: str) -> BlagptCLI:
    """The model and data of a complete configuration and what further words of a command line say; the model without memory."""
    parts.import_all()
    tree = from_arguments(["--config", str(CONFIGS / name), *words]).tree
    for key in ("callbacks", "precision"):
        tree["trainer"].pop(key, None)
    with torch.device("meta"):
        return BlagptCLI("fit", tree, run=False)
