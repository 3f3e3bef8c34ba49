"""The main job in one process: fit, watch, validate, test, generate, and what a user's mistakes end in."""

import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import scalars, texts, tiny_config

from blagpt_pl.callbacks.atomic_io import read_checkpoint
from blagpt_pl.data.shards import ShardSet, write_shard
from blagpt_pl.errors import CheckpointError, ConfigError, DataError, Diverged
from blagpt_pl.lab.generate import main as generate
from blagpt_pl.lab.load import load
from blagpt_pl.lab.train import run as command

ALWAYS = {
    "train/loss", "val/loss", "val/bpb", "val/perplexity", "lr", "grad_norm", "tokens",
    "perf/step_ms", "perf/tokens_per_s", "perf/peak_vram_mib",
}  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(file: Path, text: str) -> None:
    """A stranger's module."""
    file.write_text(textwrap.dedent(text))


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that learns a little; returns its folder."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--config", str(config), "--logs", str(folder / "logs"), "--trainer.callbacks", "[Unigram]"]
    command(
        "fit", [*words, "--trainer.max_steps", "30", "--trainer.log_every_n_steps", "5", "--data.test_tokens", "500"]
    )
    return folder / "logs/tiny/0"


def test_every_scalar_and_the_samples_are_in_tensorboard(trained: Path) -> None:
    found = scalars(trained)
    assert found.keys() >= ALWAYS
    assert [step for step, _ in found["train/loss"]] == [5, 10, 15, 20, 25, 30]
    assert [step for step, _ in found["val/loss"]] == [5, 10, 15, 20, 25, 30]
    assert dict(found["tokens"])[30] == 30 * 8 * 32
    assert any(tag.startswith("samples") for tag in texts(trained))
    for (_, loss), (_, perplexity) in zip(found["val/loss"], found["val/perplexity"], strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_result_stands_on_disk_and_agrees_with_the_events(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    found = scalars(trained)
    assert result["state"] == "finished"
    assert result["val_loss"] == pytest.approx(found["val/loss"][-1][1], rel=1e-5)
    assert result["val_loss"] < found["val/loss"][0][1]
    assert result["val_tokens"] == 1001
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2), rel=1e-4)  # a token is a byte
    assert result["best_val_loss"] == pytest.approx(min(v for _, v in found["val/loss"]), rel=1e-5)
    for name in ("hardware", "code", "versions", "config_sha256", "seed", "step_ms", "peak_ram_mib", "val_unigram_bpb"):
        assert result[name], name
    assert result["optimizer"] == "AdamW"
    assert result["optimizer_state_mib"] == pytest.approx(8 * result["parameters"] / 2**20, rel=0.01)
    assert sum(group["parameters"] for group in result["groups"]) == result["parameters"]
    rates = {group["role"]: (group["lr"], group["weight_decay"]) for group in result["groups"]}
    assert rates == {"matrix": (3e-3, 0.01), "embedding": (3e-3, 0.0), "vector": (3e-3, 0.0)}
    assert len(result["data"]["fingerprint"]) == 64
    ledger = (trained.parents[1] / "results.jsonl").read_text().splitlines()
    assert json.loads(ledger[-1]) == result


def test_the_unigram_yardstick_is_right(trained: Path, config: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    shards = [ShardSet.open([config.parent / f"{name}_0.bin"]) for name in ("train", "val")]
    train, val = (np.empty(n, np.int32) for n in (10000, 1001))
    shards[0].read(0, train)
    shards[1].read(1, val)
    counts = {t: 1 for t in range(257)}
    for t in train.tolist():
        counts[t] += 1
    nats = sum(-math.log(counts[t] / (10000 + 257)) for t in val.tolist()) / 1001
    assert result["val_unigram_loss"] == pytest.approx(nats, rel=1e-5)


def test_the_saved_configuration_is_the_run(trained: Path, tmp_path: Path) -> None:
    saved = yaml.safe_load((trained / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 30
    logs = tmp_path / "again"
    command("fit", ["--config", str(trained / "config.yaml"), "--logs", str(logs)])
    ours, theirs = (read_checkpoint(f / "checkpoints/last.ckpt")["state_dict"] for f in (logs / "tiny/0", trained))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_validate_needs_only_the_checkpoint(trained: Path, capsys: pytest.CaptureFixture) -> None:
    command("validate", ["--ckpt_path", str(trained / "checkpoints/last.ckpt")])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    result = json.loads((trained / "result.json").read_text())
    assert float(printed["val/loss"]) == pytest.approx(result["val_loss"], rel=1e-5)
    assert printed["val/tokens"] == "1,001"


def test_the_test_tokens_are_others(trained: Path, capsys: pytest.CaptureFixture) -> None:
    command("test", ["--ckpt_path", str(trained / "checkpoints/last.ckpt")])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert printed["test/tokens"] == "500"
    model, _, _ = load(str(trained / "checkpoints/last.ckpt"))
    tokens = np.empty(501, np.int32)
    data = yaml.safe_load((trained / "config.yaml").read_text())["data"]["source"]["init_args"]
    ShardSet.open(sorted(Path("/").glob(data["val"][0].lstrip("/")))).read(1001, tokens)
    nats = 0.0
    for start in range(0, 500, 32):
        window = torch.tensor(tokens[start : min(start + 33, 501)], dtype=torch.int64)[None]
        with torch.no_grad():
            logits = model(window[:, :-1])
        nats += torch.nn.functional.cross_entropy(logits[0].double(), window[0, 1:], reduction="sum").item()
    assert float(printed["test/loss"]) == pytest.approx(nats / 500, rel=1e-5)


def test_generate_continues_a_prompt(trained: Path, capsys: pytest.CaptureFixture) -> None:
    words = [str(trained), "--prompt", "abc", "--max_new_tokens", "7", "--samples", "2"]
    generate(words)
    first = capsys.readouterr().out
    assert first.count("abc") == 2
    generate(words)
    assert capsys.readouterr().out == first  # the same dice
    with pytest.raises(ConfigError, match="--top_k: 0"):
        generate([*words, "--top_k", "0"])
    with pytest.raises(CheckpointError, match="holds no checkpoints"):
        generate([str(trained.parent)])


def test_a_strangers_part_needs_no_registration(here: Path, config: Path) -> None:
    """The one that README shows, as it stands there."""
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    (here / "my_ideas.py").write_text(next(block for block in blocks if "my_ideas.py" in block))
    words = ["--config", str(config), "--model.block.attention", "my_ideas.RunningMean", "--trainer.max_steps", "6"]
    command("fit", [*words, "--model.block.attention.scale", "0.5"])
    saved = yaml.safe_load((here / "logs/tiny/0/config.yaml").read_text())
    part = saved["model"]["init_args"]["block"]["init_args"]["attention"]
    assert part == {"class_path": "my_ideas.RunningMean", "init_args": {"scale": 0.5}}


def test_an_optimizer_of_two_by_role_fits_the_wiring(here: Path, config: Path) -> None:
    """A stranger's optimizer: Muon on the matrices, AdamW on the rest, one object; clipped, scheduled, resumed."""
    write(
        here / "two.py",
        """
        import torch
        from torch.optim import AdamW, Muon, Optimizer


        class MuonAndAdamW(Optimizer):
            def __init__(self, params, lr: float = 1e-3, muon_lr: float = 2e-3):
                groups = [{**g, 'lr': muon_lr if g['role'] == 'matrix' else lr} for g in params]
                super().__init__(groups, {'lr': lr})
                matrices = [g for g in self.param_groups if g['role'] == 'matrix']
                others = [g for g in self.param_groups if g['role'] != 'matrix']
                assert matrices and others
                self.parts = [Muon(matrices, adjust_lr_fn='match_rms_adamw'), AdamW(others)]
                for part in self.parts:
                    part.state = self.state
                    mine = [g for g in self.param_groups if (g['role'] == 'matrix') == (part is self.parts[0])]
                    for g in mine:
                        for key, value in part.defaults.items():
                            g.setdefault(key, value)
                    part.param_groups = mine

            def load_state_dict(self, state):
                super().load_state_dict(state)
                for part in self.parts:
                    part.state = self.state
                    part.param_groups = [g for g in self.param_groups if (g['role'] == 'matrix') == (part is self.parts[0])]

            def step(self, closure=None):
                loss = closure() if closure else None
                for part in self.parts:
                    part.step()
                return loss
    """,
    )
    words = ["--config", str(config), "--model.optimizer", "two.MuonAndAdamW", "--trainer.gradient_clip_val", "1.0"]
    command("fit", [*words, "--name", "whole"])
    found = scalars(here / "logs/whole/0")
    assert found["train/loss"][-1][1] < found["train/loss"][0][1]
    assert found["lr/matrix"][5][1] == pytest.approx(2e-3)  # past the warm-up
    assert found["lr/embedding"][5][1] == pytest.approx(1e-3)
    write(
        here / "stop.py",
        """
        import lightning as L


        class Stop(L.Callback):
            def on_train_batch_start(self, trainer, *_):
                if trainer.global_step == 7:
                    raise SystemExit(1)
    """,
    )
    with pytest.raises(SystemExit):
        command("fit", [*words, "--name", "cut", "--checkpoint.every_n_steps", "1", "--trainer.callbacks+=stop.Stop"])
    resumed = ["--ckpt_path", "logs/cut/0/checkpoints/last.ckpt"]
    command("fit", [*words, "--name", "again", *resumed])
    a, b = (read_checkpoint(here / f"logs/{n}/0/checkpoints/last.ckpt")["state_dict"] for n in ("whole", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_compiled_training_equals_eager_training(here: Path, config: Path) -> None:
    words = ["--config", str(config), "--model.dropout", "0", "--model.block.dropout", "0"]
    command("fit", [*words, "--name", "eager"])
    command("fit", [*words, "--name", "compiled", "--model.compile", "aot_eager"])
    a, b = (
        read_checkpoint(here / f"logs/{name}/0/checkpoints/last.ckpt")["state_dict"] for name in ("eager", "compiled")
    )
    assert a.keys() == b.keys()
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-6


def test_bf16_mixed_trains(here: Path, config: Path) -> None:
    command("fit", ["--config", str(config), "--trainer.precision", "bf16-mixed", "--trainer.max_steps", "20"])
    losses = [v for _, v in scalars(here / "logs/tiny/0")["train/loss"]]
    assert losses[-1] < losses[0] - 0.2


def test_real_text_is_learned(here: Path, config: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty steps on GPT-2 tokens leave the uniform model (10.83 nats) well behind."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shards / "tiktoken-cache"))
    source = {"train": [f"{shards}/shards/webtext_train_*.bin"], "val": [f"{shards}/shards/webtext_val_*.bin"]}
    layer = {
        "model.vocab_size": 50304, "model.d_model": 64, "model.dropout": 0.0, "model.optimizer.lr": 0.01,
        "model.block.dropout": 0.0,
        "data.source": {"class_path": "ShardFiles", "init_args": {**source, "tokenizer": "GPT2Tokenizer"}},
        "data.context": 64, "data.val_tokens": 8192, "trainer.max_steps": 30, "trainer.val_check_interval": 30,
    }  # fmt: skip
    Path("text.yaml").write_text(yaml.safe_dump(layer))
    command("fit", ["--config", str(config), "--config", "text.yaml"])
    result = json.loads((here / "logs/tiny/0/result.json").read_text())
    assert result["val_loss"] < 8.6
    bytes_a_token = result["val_loss"] / math.log(2) / result["val_bpb"]
    assert 3.5 < bytes_a_token < 5.0
    assert scalars(here / "logs/tiny/0").keys() >= ALWAYS


def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(here: Path, config: Path) -> None:
    write(
        here / "poison.py",
        """
        import lightning as L


        class Poison(L.Callback):
            def on_before_optimizer_step(self, trainer, model, optimizer):
                if trainer.global_step == 7:
                    next(model.parameters()).grad.fill_(float('nan'))
    """,
    )
    words = ["--config", str(config), "--trainer.callbacks+=poison.Poison", "--checkpoint.every_n_steps", "2"]
    with pytest.raises(Diverged, match=r"step 8: (grad_norm is nan|a parameter is not finite).*last.ckpt"):
        command("fit", [*words, "--trainer.log_every_n_steps", "4"])
    saved = read_checkpoint(here / "logs/tiny/0/checkpoints/last.ckpt")
    assert saved["global_step"] == 6
    assert all(v.isfinite().all() for v in saved["state_dict"].values())
    assert json.loads((here / "logs/tiny/0/status.json").read_text())["state"] == "diverged"


def broken_shard(folder: Path, kind: str) -> None:
    """Replace the training shard by one with something wrong."""
    file = folder / "train_0.bin"
    content = bytearray(file.read_bytes())
    if kind == "magic":
        content[:4] = (7).to_bytes(4, "little")
    elif kind == "length":
        content = content[:-100]
    elif kind == "token":
        content[1024 + 2 * 17 : 1024 + 2 * 17 + 2] = (300).to_bytes(2, "little")
    file.write_bytes(content)


MISTAKES: dict[str, tuple[Callable[[Path], object], list[str], type, str]] = {
    "no shard": (lambda f: (f / "train_0.bin").unlink(), [], DataError, r"no file matches .*train_\*"),
    "bad magic": (lambda f: broken_shard(f, "magic"), [], DataError, r"train_0.bin: magic 7 \(expected 20240520"),
    "bad length": (lambda f: broken_shard(f, "length"), [], DataError, r"train_0.bin: .*bytes \(expected"),
    "token beyond the vocabulary": (
        lambda f: broken_shard(f, "token"),
        [],
        DataError,
        r"train_0.bin: token id 300 at index 17",
    ),
    "vocabulary too small": (
        lambda f: None,
        ["--model.vocab_size", "200"],
        ConfigError,
        r"model.vocab_size: 200 .*257",
    ),
    "indivisible batch": (lambda f: None, ["--data.batch_size", "9"], ConfigError, r"data.batch_size: 9 .*8|12"),
    "too few validation tokens": (lambda f: None, ["--data.val_tokens", "9999"], DataError, r"val.*9999|10000"),
    "no such checkpoint": (
        lambda f: None,
        ["--ckpt_path", "nowhere.ckpt"],
        CheckpointError,
        r"nowhere.ckpt: no such checkpoint",
    ),
    "typo": (
        lambda f: None,
        ["--model.block.attention.n_haeds", "2"],
        ConfigError,
        r"model.block.attention.n_haeds: .*n_heads",
    ),
    "unknown class": (
        lambda f: None,
        ["--model.block.mlp", "GatedMPL"],
        ConfigError,
        r"model.block.mlp: 'GatedMPL'.*GatedMLP",
    ),
    "bad heads": (
        lambda f: None,
        ["--model.block.attention.n_heads", "5"],
        ConfigError,
        r"d_model=32 does not split into n_heads=5",
    ),
    "schedule longer than the run": (
        lambda f: None,
        ["--trainer.max_steps", "5"],
        ConfigError,
        r"warmup=2 and warmdown=4",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_and_nothing_is_made(here: Path, name: str) -> None:
    spoil, words, kind, message = MISTAKES[name]
    folder = here / "data"
    folder.mkdir()
    walk = np.arange(10000) % 256
    write_shard(folder / "train_0.bin", walk, 257)
    write_shard(folder / "val_0.bin", walk[::-1][:2000], 257)
    (here / "tiny.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    spoil(folder)
    with pytest.raises(kind, match=message) as caught:
        command("fit", ["--config", "tiny.yaml", *words])
    assert len(str(caught.value).splitlines()) <= 3
    if name != "token beyond the vocabulary":  # found when it is read
        assert not (here / "logs").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "code"])
def test_a_damaged_checkpoint_is_told(trained: Path, here: Path, config: Path, damage: str) -> None:
    whole = (trained / "checkpoints/last.ckpt").read_bytes()
    bad = here / "bad.ckpt"
    if damage == "code":
        torch.save({"state_dict": {}, "x": Path("a path is an object")}, bad)
    else:
        bad.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match="bad.ckpt: (damaged|refused)"):
        command("fit", ["--config", str(config), "--ckpt_path", str(bad)])
    assert not (here / "logs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.block.mlp.ratio", "3"], r"blocks.0.mlp.part.gate_up.weight is \(\d+, 32\) there, \(192, 32\) here"),
        (["--model.n_layers", "3"], r"the checkpoint holds no blocks.2.attention.norm.weight"),
        (["--model.n_layers", "1"], r"the checkpoint holds blocks.1.attention.norm.weight, which has no place here"),
    ],
)
def test_another_models_checkpoint_is_told(trained: Path, here: Path, config: Path, words: list, message: str) -> None:
    last = trained / "checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match=f"ckpt_path: {message}; fix: a checkpoint of this BlaGPT") as caught:
        command("fit", ["--config", str(config), *words, "--ckpt_path", str(last)])
    assert len(str(caught.value).splitlines()) == 1
