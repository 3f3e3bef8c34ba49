"""Growing through the `blagpt` command: train, add parameter tokens, go on as the same function, twice; resume without the donor."""

import copy
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness import scalars
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from blagpt_pl.callbacks.atomic_io import read_checkpoint
from blagpt_pl.errors import CheckpointError, ConfigError
from blagpt_pl.lab.check import main as check
from blagpt_pl.lab.generate import main as generate
from blagpt_pl.lab.load import load
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.train import run as command
from blagpt_pl.lm import LanguageModel

N = 16
TOKENS = torch.arange(64).view(2, 32) * 5 % 257
STOP = '''
"""Stops the run at the start of step 7 while a file stands there, as a fault would."""

from pathlib import Path

from lightning import Callback


class Fault(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 7 and Path("fault").is_file():
            raise RuntimeError("a fault")
'''


def grown(n: int, donor: str) -> list[str]:
    """What makes a model with n tokens a map out of a donor that began with N."""
    otherwise = {"class_path": "GPT2Init", "init_args": {"zero_outputs": True}}
    init = {"class_path": "FromCheckpoint", "init_args": {"path": donor, "otherwise": otherwise}}
    parts = ("attention", "mlp")
    sizes = [
        f"--model.block.{part}.{name}={size}" for part in parts for name, size in (("n_tokens", n), ("grown_from", N))
    ]
    return ["--model.init", json.dumps(init), *sizes]


@pytest.fixture(scope="module")
def home(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a tiny TokenFormer."""
    folder = tmp_path_factory.mktemp("grow")
    tree = yaml.safe_load(config.read_text())
    block = tree["model"]["init_args"]["block"]["init_args"]
    attention = {"n_heads": 4, "n_tokens": N, "edits": ["RoPE"], "core": "SDPA"}
    block["attention"] = {"class_path": "PattentionAttention", "init_args": attention}
    block["mlp"] = {"class_path": "PattentionMLP", "init_args": {"n_tokens": N}}
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    (folder / "grow_fault.py").write_text(STOP)
    return folder


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    return home


@pytest.fixture(scope="module")
def donor(home: Path) -> Path:
    """A trained model's run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        command("fit", ["--config", "small.yaml", "--name", "small"])
    return home / "logs/small/0"


LAST = "checkpoints/last.ckpt"


def logits(model: LanguageModel, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).to(dtype).eval()(TOKENS)


class Begun(Exception):
    """A run is about to train this model."""


@pytest.fixture
def as_begun(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], LanguageModel]:
    """The model of a `fit` at step 0, which is not taken."""

    def begin(words: list[str]) -> LanguageModel:
        with monkeypatch.context() as patch:
            patch.setattr(LanguageModel, "on_train_start", lambda model: (_ for _ in ()).throw(Begun(model)))
            with pytest.raises(Begun) as begun:
                command("fit", words)
        return begun.value.args[0]

    return begin


def test_a_grown_run_begins_as_the_function_it_grew_out_of(here: Path, donor: Path, as_begun: Callable) -> None:
    """And goes on: the new tokens learn, and it can be grown once more."""
    base = ["--config", str(donor / "config.yaml")]  # the donor's own, then what differs
    small, _, _ = load(str(donor / LAST))
    first = [*base, *grown(2 * N, f"{donor}/{LAST}"), "--name", "larger"]
    model = as_begun([*first, "--logs", "begun"])
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        scale = logits(small, dtype).abs().max()
        assert (logits(model, dtype) - logits(small, dtype)).abs().max() < most * scale
    command("fit", first)
    larger, _, saved = load(str(here / "logs/larger/0" / LAST))
    assert saved["global_step"] == 12
    losses = [dict(scalars(here / f"logs/{name}/0")["val/loss"]) for name in ("small", "larger")]
    assert losses[1][12] < losses[0][12] < losses[0][5]
    keys = {name: t for name, t in larger.state_dict().items() if name.endswith(".keys")}
    values = {name: t for name, t in larger.state_dict().items() if name.endswith(".values")}
    begun = model.state_dict()
    assert len(keys) == len(values) == 10
    assert all(t[N:].count_nonzero(1).all() and not begun[name][N:].any() for name, t in keys.items())
    assert all((t != begun[name])[:, N:].all() for name, t in values.items())

    second = [*base, *grown(5 * N, "logs/larger/0/" + LAST), "--name", "largest"]
    model = as_begun([*second, "--logs", "begun"])
    gap = (logits(model, torch.float64) - logits(larger, torch.float64)).abs().max()
    assert gap < 1e-12 * logits(larger, torch.float64).abs().max()
    assert {t.item() for name, t in model.state_dict().items() if name.endswith("counted")} == {N}


def test_it_goes_on_bit_for_bit_without_the_donor(here: Path, donor: Path, capsys: pytest.CaptureFixture) -> None:
    """The same command after a fault; then the checkpoint alone validates and generates."""
    file = here / "donor.ckpt"
    file.write_bytes((donor / LAST).read_bytes())
    words = ["--config", str(donor / "config.yaml"), *grown(2 * N, "donor.ckpt"), "--checkpoint.every_n_steps", "3"]
    words += ["--trainer.callbacks", "[grow_fault.Fault]"]
    command("fit", [*words, "--name", "whole"])
    (here / "fault").touch()
    with pytest.raises(RuntimeError, match="a fault"):
        command("fit", [*words, "--name", "cut"])
    gc.collect()  # the run's lock goes with it, as it would with its process
    (here / "fault").unlink()
    file.unlink()
    capsys.readouterr()
    command("fit", [*words, "--name", "cut"])
    assert "resuming from logs/cut/0/checkpoints/last.ckpt (step 6)" in capsys.readouterr().out
    whole, cut = (read_checkpoint(here / f"logs/{name}/0/{LAST}") for name in ("whole", "cut"))
    assert [p.name for p in (here / "logs/cut").iterdir()] == ["0"]
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    assert all(torch.equal(t, cut["state_dict"][name]) for name, t in whole["state_dict"].items())
    assert "FromCheckpoint" in cut["config"]  # what it began from stays on record

    generate(["logs/cut/0", "--prompt", "abc", "--max_new_tokens", "4"])
    assert "abc" in capsys.readouterr().out
    result = json.loads((here / "logs/cut/0/result.json").read_text())
    for more in ([], words[:-2]):  # alone, and with a configuration beside it
        command("validate", [*more, "--ckpt_path", f"logs/cut/0/{LAST}"])
        told = dict(line.split() for line in capsys.readouterr().out.splitlines())
        assert float(told["val/loss"]) == pytest.approx(result["val_loss"], rel=1e-5)
    command("fit", [*words, "--name", "branch", "--ckpt_path", f"logs/cut/0/{LAST}", "--trainer.max_steps", "13"])
    with pytest.raises(CheckpointError, match=r"^donor.ckpt: no such checkpoint"):  # but a run of its own needs it
        command("fit", [*words, "--name", "again"])
    assert not (here / "logs/again").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--model.block.mlp.grown_from", "8"],
            r"blocks\.0\.mlp\.part\.out: a mean over 16 .* 8 here; fix: grown_from: 16",
        ),
        (["--model.d_model", "64"], r"embedding\.weight: \(257, 32\) there, \(257, 64\) here; fix: the sizes"),
        (["--model.n_layers", "3"], r"holds no blocks\.2\.\S+; fix: "),
        (["--model.token_bias", "true"], r"holds no token_bias\.weight; fix: "),
    ],
)
def test_misfits_are_told_in_one_line(here: Path, donor: Path, changes: list[str], message: str) -> None:
    words = ["--config", str(donor / "config.yaml"), *grown(2 * N, f"{donor}/{LAST}"), "--name", "misfit", *changes]
    with pytest.raises(ConfigError, match=rf"^model\.init: {re.escape(str(donor))}/{LAST}: {message}") as told:
        command("fit", words)
    assert "\n" not in str(told.value)
    assert not (here / "logs/misfit").exists()


def test_what_trains_nothing_needs_no_donor(here: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither the weightless models that `describe` asks, nor the tiny one of `check`."""
    words = ["--config", "small.yaml", *grown(2 * N, "nowhere.ckpt")]
    for weightless in (torch.device("meta"), FakeTensorMode()):
        with weightless:
            assert isinstance(model_of(layers_for(words)), LanguageModel)
    check([*words, "--only", "causality", "state dict", "first loss"])
    assert "all 3 promises kept" in capsys.readouterr().out
