"""A model from layers alone: the one that `fit` would train, and the words in which `fit` would refuse it."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.train import BlagptCLI, run
from blagpt_pl.nn.base import count

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]


def small() -> Layers:
    return layers_for([*QUICKSTART, "--model.d_model=32", "--model.n_layers=2", "--data.context=16"])


def test_it_is_the_model_of_fit() -> None:
    layers = small()
    tree = copy.deepcopy(layers.tree)
    seed_everything(5, verbose=False)
    ours = model_of(layers)
    assert layers.tree == tree
    theirs = BlagptCLI("fit", {**tree, "seed_everything": 5}, run=False).model
    assert ours.context == theirs.context == 16
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


def test_without_memory() -> None:
    layers = layers_for(["--config", str(CONFIGS / "blagpt.yaml")])
    with torch.device("meta"):
        model = model_of(layers)
    assert count(model.parameters()) == 142_570_752
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of fake tensors that are copied
        model = model_of(layers)
    assert all(isinstance(p, FakeTensor) for p in model.parameters())


def test_another_tree() -> None:
    layers = small()
    tree = copy.deepcopy(layers.tree)
    tree["model"]["init_args"]["d_model"] = 24
    tree["data"]["context"] = 9
    model = model_of(layers, tree)
    assert (model.embedding.embedding_dim, model.context) == (24, 9)


MISTAKES = [
    ("model.block.mlp.ratoi: 3", "model.block.mlp.ratoi: GatedMLP has no such option; did you mean ratio?"),
    ("data.contxt: 3", "data.contxt: TokenData has no such option; did you mean context?"),
    ("trainer.max_stepz: 3", "trainer.max_stepz: Trainer has no such option; did you mean max_steps"),
    ("model.d_model: wide", "model.d_model: 'wide' (expected a whole number)"),
    ("trainer.max_steps: 1e3\nmodel.norm: SiLU", "model.norm: 'SiLU' does not fit here"),
    ("model.block.attention.n_kv_heads: 5", "layer 0: n_heads=4 does not group into n_kv_heads=5; choose of [1, 2, 4]"),
    ("model.vocab_size: 0", "model.vocab_size: 0 (expected 1 or more)"),
    ("model.context: 5", "model.context: is taken from data.context; fix: write data.context: 5 instead"),
]


@pytest.mark.parametrize(("text", "begins"), MISTAKES)
def test_it_is_refused_as_by_fit(text: str, begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over.yaml").write_text(f"# a difference\n{text}\n")
    argv = [*QUICKSTART, "--config", "over.yaml"]
    with pytest.raises(ConfigError) as theirs:
        run("fit", [*argv, "--trainer.accelerator=cpu"])
    with pytest.raises(ConfigError) as ours:
        model_of(layers_for(argv))
    assert str(ours.value) == str(theirs.value)
    assert str(ours.value).startswith(begins)
    assert "(in over.yaml:2)" in str(ours.value) or begins.startswith("layer 0")


@pytest.mark.parametrize(
    ("argv", "begins"),
    [
        ([], "no configuration is named; fix: name a file, such as --config configs/blagpt.yaml"),
        (["--model.block.mlp.ratio", "3"], "model: no layer names its class; fix: name a complete --config first"),
        (["--model", "BlaGPT"], "model.vocab_size: has no value, and BlaGPT needs one"),
        ([*QUICKSTART, "--foo", "3"], "foo: no such field; fields: model, "),
        ([*QUICKSTART, "--foo"], "--foo: has no value"),
        ([*QUICKSTART, "foo"], "'foo': belongs to no flag"),
        ([*QUICKSTART, "--print_config"], "--print_config: has no value"),
        ([*QUICKSTART, "--model.help"], "--model.help: no such help here; fix: blagpt fit --model.help"),
    ],
)
def test_words(argv: list[str], begins: str) -> None:
    with pytest.raises(ConfigError) as error:
        layers_for(argv)
    assert str(error.value).startswith(begins)


def test_a_value_that_no_layer_has_said() -> None:
    layers = small()
    with pytest.raises(
        ConfigError, match=r"^data.batch_size: 2.5 \(expected a whole number\) \(on the command line\)$"
    ):
        layers_for([*QUICKSTART, "--data.batch_size=2.5"])
    with pytest.raises(ConfigError, match=r"^model.n_layers: 0 \(expected 1 or more\) \(on the command line\)$"):
        model_of(
            layers,
            {
                **layers.tree,
                "model": {"class_path": "BlaGPT", "init_args": {**layers.tree["model"]["init_args"], "n_layers": 0}},
            },
        )
