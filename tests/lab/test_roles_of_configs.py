"""In every configuration that is shipped: what belongs to tokens never reaches an optimizer of matrices, and all else is in one group."""

from collections import Counter
from pathlib import Path

import pytest
from torch import nn

from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.optim.composite import Composite

ROOT = Path(__file__).resolve().parents[2]
MUON = ROOT / "configs/optim/muon.yaml"
FOLDERS = ("models", "techniques")
CONFIGS = [file for folder in FOLDERS for file in sorted((ROOT / "configs" / folder).glob("*.yaml"))]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_tables_of_tokens_go_to_the_other_optimizer(file: Path) -> None:
    files = [ROOT / "configs/blagpt.yaml", file, MUON]
    model = model_of(Layers(tiny(layers_for([word for f in files for word in ("--config", str(f))]).tree)))
    optimizer = model.make_optimizer()
    assert isinstance(optimizer, Composite)
    groups = {name: member.param_groups for name, member in optimizer.members.items()}
    placed = {name: {id(p) for group in some for p in group["params"]} for name, some in groups.items()}
    places = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert places == Counter({id(p): 1 for p in model.parameters() if p.requires_grad})
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    of_tokens = {id(p) for p in model.parameters() if model.vocab_size in p.shape}
    assert tables & of_tokens  # the token embedding at least
    assert not placed["matrix"] & (tables | of_tokens)
    assert not placed["matrix"] & {id(p) for p in model.parameters() if p.ndim < 2}
