"""The overlays of optimizers: what they build over the baseline, and that a bare name means the house's own class."""

import runpy
from pathlib import Path

import pytest
import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.muon import Muon

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted((ROOT / "configs/optim").glob("*.yaml"))


def optimizer(name: str, *words: str) -> torch.optim.Optimizer:
    files = [f"{ROOT}/configs/blagpt.yaml", f"{ROOT}/configs/optim/{name}.yaml"]
    tree = layers_for([*(word for file in files for word in ("--config", file)), *words]).tree
    return model_of(Layers(tiny(tree))).make_optimizer()


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    found = optimizer("muon", "--model.optimizer.matrix.scale", "rms")
    assert isinstance(found, Composite)
    assert isinstance(found.members["matrix"], Muon)  # not torch.optim.Muon, which is loaded, too
    assert found.members["matrix"].scale(8, 2) == pytest.approx(0.2 * 8**0.5)
    assert isinstance(found.members["other"], torch.optim.AdamW)
    assert [g["lr"] for g in found.param_groups] == [0.02, 1e-3, 1e-3]


def test_torchs_own_muon_is_had_by_its_full_name() -> None:
    found = optimizer("muon", "--model.optimizer.matrix", "torch.optim.Muon")
    assert isinstance(found.members["matrix"], torch.optim.Muon)


def test_a_wrong_option_is_told_in_the_words_of_the_houses_class() -> None:
    with pytest.raises(ConfigError, match="Muon has no such option; did you mean steps"):
        optimizer("muon", "--model.optimizer.matrix.step", "3")
    with pytest.raises(ConfigError, match="Muon has no such option; options: lr, momentum, nesterov"):
        optimizer("muon", "--model.optimizer.matrix.ns_coefficients", "3")


def test_adamw_decays_the_matrices() -> None:
    decay = {g["role"]: g["weight_decay"] for g in optimizer("adamw").param_groups}
    assert decay == {"matrix": 0.1, "embedding": 0.0, "vector": 0.0}


def test_every_overlay_has_a_line_in_the_table() -> None:
    text = (ROOT / "docs/optimizers.md").read_text()
    assert [p.stem for p in OVERLAYS if f"(optim/{p.stem}.md)" not in text] == []


def test_the_table_is_what_the_code_says() -> None:
    """Generated anew, it is the one in docs/optimizers.md; if not: python docs/optim/table.py."""
    page = (ROOT / "docs/optimizers.md").read_text()
    assert runpy.run_path(str(ROOT / "docs/optim/table.py"))["written"](page) == page
