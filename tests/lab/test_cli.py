"""The `blagpt` command: help without imports, exit codes, one line for each mistake, silence when all is well.

Processes are slow to start, so what can be asked in this one is, and each process answers several questions.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from blagpt_pl import __version__, cli
from blagpt_pl.data.shards import write_shard
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.checkpoint_layer import checkpoint_layer
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.strict_yaml import load_text
from blagpt_pl.lab.train import run

BLAGPT = Path(sys.executable).parent / "blagpt"
CONFIG = """\
name: t
model:
  class_path: BlaGPT
  init_args:
    vocab_size: 320
    d_model: 16
    n_layers: 1
    norm: RMSNorm
    head: TiedHead
    init: {class_path: GPT2Init, init_args: {zero_outputs: true}}
    block:
      class_path: Block
      init_args:
        norm: RMSNorm
        attention: {class_path: Attention, init_args: {n_heads: 2, edits: [RoPE], core: SDPA}}
        mlp: {class_path: MLP, init_args: {activation: ReLU2}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3}}
    schedule: Constant
trainer: {max_steps: 2, accelerator: cpu, devices: 1}
data:
  source: {class_path: ShardFiles, init_args: {train: [train.bin], val: [val.bin], tokenizer: ByteTokenizer}}
  context: 16
  batch_size: 4
  device_batch_size: 2
  val_tokens: 100
samples: {max_new_tokens: 4}
"""
CHANGES = """\
model.block.attention.edits+: {class_path: QKNorm, norm: RMSNorm}
model.optimizer.betas: [0.8, 0.9]
trainer: {callbacks: [LearningRateMonitor], logger: [{class_path: CSVLogger, save_dir: csv}], precision: bf16-true}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny corpus of bytes, a configuration, and a difference to it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "base.yaml").write_text(CONFIG)
    (folder / "over.yaml").write_text(CHANGES)
    dice = np.random.default_rng(0)
    for name in ("train", "val"):
        write_shard(folder / f"{name}.bin", dice.integers(0, 256, 2000), 257)
    return folder


def blagpt(folder: Path, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([BLAGPT, *argv], cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def asked(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """What the command prints, asked in this process."""
    try:
        cli.COMMANDS[argv[0]](argv[0], list(argv[1:]))
    except SystemExit as end:
        assert not end.code
    return capsys.readouterr().out


# ---------------------------------------------------------------------- without importing anything


def test_help_imports_neither_torch_nor_lightning() -> None:
    """All that needs no model, one after the other in one process, which then looks at what was imported."""
    script = """
import sys
from blagpt_pl import cli
for argv in (["--help"], ["-h"], [], ["--version"], ["fit", "--help"], ["validate", "-h"], ["test", "--config", "x", "--help"], ["nonsense"], ["fti"]):
    sys.argv = ["blagpt", *argv]
    print(">>>", argv)
    try:
        cli.main()
    except SystemExit as end:
        print("exit", end.code)
heavy = {"torch", "lightning", "jsonargparse", "numpy", "yaml", "pytorch_lightning", "torchmetrics"} & set(sys.modules)
print("heavy", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    answers = done.stdout.split(">>> ")[1:]
    assert answers[-1].endswith("heavy []\n"), "an import crept in"
    for answer in answers[:3]:
        assert "usage: blagpt <command>" in answer
    assert f"blagpt {__version__}" in answers[3]
    for answer, command in zip(answers[4:7], ("fit", "validate", "test"), strict=True):
        assert f"usage: blagpt {command} --config FILE" in answer
    assert all("exit 2" in answer for answer in answers[7:])
    assert done.stderr.splitlines() == [
        f"error: 'nonsense' is not a command (expected {', '.join(cli.COMMANDS)})",
        f"error: 'fti' is not a command (expected {', '.join(cli.COMMANDS)}); did you mean fit?",
    ]


def test_the_usage_names_every_command() -> None:
    listed = re.findall(r"^  (\w+)  ", cli.USAGE.partition("commands\n")[2].partition("\n\n")[0], re.MULTILINE)
    assert sorted(listed) == sorted(cli.COMMANDS)


# ---------------------------------------------------------------------- help that is true


def help_of(command: str) -> str:
    what, ckpt = cli.TRAIN[command]
    return cli.TRAIN_HELP.format(command=command, what=what, ckpt=ckpt)


@pytest.mark.parametrize("command", cli.TRAIN)
def test_every_flag_in_the_help_exists(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(home)
    options = asked(capsys, command, "--help-all")
    flags = re.findall(r"^  --([\w.]+) (?:N|NAME|FILE) ", help_of(command), re.MULTILINE)
    assert {"config", "name", "data.batch_size", "trainer.max_steps", "ckpt_path", "seed_everything"} <= set(flags)
    for flag in flags:
        assert f"--{flag} " in options, flag


def test_the_examples_in_the_help_work(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(home)
    lines = re.findall(r"^  --(model\.[\w.\[\]]+\+?)[= ](\S+)  ", help_of("fit"), re.MULTILINE)
    assert len(lines) >= 4
    argv = [word for key, value in lines if key != "model.help" for word in (f"--{key}", value)]
    argv = [*argv, "--model.block.mlp.activation", "GELU"]
    twice = argv.index("--model.block.attention.edits+")
    argv[twice : twice + 2] = [
        "--model.block.attention.edits+",
        "{class_path: QKNorm, norm: RMSNorm}",
    ]  # one RoPE to choose
    resolved = load_text(asked(capsys, "fit", "--config", "base.yaml", *argv, "--print_config"), "x")["model"][
        "init_args"
    ]
    assert resolved["d_model"] == 512
    assert resolved["block"]["init_args"]["mlp"]["class_path"].endswith(".MLP")
    assert resolved["block"]["init_args"]["attention"]["init_args"]["edits"][0]["init_args"]["theta"] == 1e6


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--model.help", "BlaGPT"], "--model.n_layers"),
        (["--config", "base.yaml", "--model.block.help", "Block"], "--block.post_norm"),
        (["--model.optimizer.help", "torch.optim.AdamW"], "--optimizer.weight_decay"),
        (["--data.source.help", "PythonLibrary"], "--data.source.val_percent"),
    ],
)
def test_help_of_a_class(
    argv: list[str], word: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(home)
    assert word in asked(capsys, "fit", *argv)


@pytest.mark.parametrize("argv", [["base.yaml"], ["base.yaml", "over.yaml"]])
def test_the_resolved_config_is_a_fixed_point(
    argv: list[str], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(home)
    words = [word for name in argv for word in ("--config", name)]
    once = asked(capsys, "fit", *words, "--print_config")
    (tmp_path / "once.yaml").write_text(once)
    assert asked(capsys, "fit", "--config", str(tmp_path / "once.yaml"), "--print_config") == once
    bare = yaml.safe_load(once)
    assert bare["data"]["context"] == 16
    assert "context" not in bare["model"]["init_args"], "what is taken from data.context is said once"


# ---------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def trained(home: Path) -> subprocess.CompletedProcess:
    """A run of two steps, in logs/t/0 at home."""
    return blagpt(home, "fit", "--config", "base.yaml")


def test_a_healthy_run_is_quiet_and_its_config_runs_again(
    home: Path, trained: subprocess.CompletedProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done = trained
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stderr + done.stdout).lower()
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    assert "finished: step 2 of 2" in done.stdout
    folder = home / "logs" / "t" / "0"
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    saved = folder / "config.yaml"
    monkeypatch.chdir(home)
    assert asked(capsys, "fit", "--config", str(saved), "--print_config") == saved.read_text()


def test_nobody_reads_on(home: Path) -> None:
    """As in `blagpt list | head -1`; here the reader has left before the first word."""
    for argv in (["list"], ["--help"], ["fit", "--help"], ["fit", "--config", "base.yaml", "--print_config"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [BLAGPT, *argv], cwd=home, stdout=writer, stderr=subprocess.PIPE, check=False, timeout=120
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b""), argv


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: str, argv: list[str]) -> None:
        raise BrokenPipeError("of a worker")

    monkeypatch.setitem(cli.COMMANDS, "fit", broken)
    monkeypatch.setattr(sys, "argv", ["blagpt", "fit"])
    with pytest.raises(BrokenPipeError, match="of a worker"):
        cli.main()


@pytest.mark.parametrize(
    ("argv", "code", "begins"),
    [
        (
            ["--model.d_modle", "3"],
            2,
            "error: model.d_modle: BlaGPT has no such option; did you mean d_model? (on the command line)",
        ),
        (["--data.source.val", "[nothing.bin]"], 3, "error: data: no file matches 'nothing.bin'"),
        (["--ckpt_path", "val.bin"], 4, "error: val.bin: damaged or not a checkpoint"),
    ],
)
def test_exit_codes(argv: list[str], code: int, begins: str, home: Path) -> None:
    done = blagpt(home, "fit", "--config", "base.yaml", "--name", f"code{code}", *argv)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(begins)
    assert not (home / "logs" / f"code{code}").exists(), "a run that never began leaves nothing"


# ---------------------------------------------------------------------- the same, in this process


@pytest.mark.parametrize(
    ("argv", "begins"),
    [
        (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches: 2"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps: -1"),
        (["--trainer.val_check_interval", "0.5"], "trainer.val_check_interval: 0.5"),
        (["--model.context", "8"], "model.context: is taken from data.context"),
        (["--checkpoint.monitor", "val/los"], "checkpoint.monitor: 'val/los'"),
        (["--seed_everything", "false"], "seed_everything: false"),
        (["--name", "../x"], "name: '../x'"),
    ],
)
def test_rules_are_asked(argv: list[str], begins: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by Lightning, taken back by monkeypatch
        monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError) as error:
        run("fit", ["--config", "base.yaml", *argv])
    assert str(error.value).startswith(begins)


# ---------------------------------------------------------------------- over a checkpoint

CHECKPOINT = "logs/t/0/checkpoints/last.ckpt"


def measured(capsys: pytest.CaptureFixture, *argv: str) -> dict[str, str]:
    return dict(line.split() for line in asked(capsys, "validate", "--ckpt_path", CHECKPOINT, *argv).splitlines())


def test_a_difference_alone_is_one_to_the_checkpoint(
    home: Path, trained: subprocess.CompletedProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert trained.returncode == 0
    monkeypatch.chdir(home)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # set by Lightning, taken back by monkeypatch
        monkeypatch.setenv(name, "0")
    loss = json.loads(Path("logs/t/0/result.json").read_text())["val_loss"]
    Path("z_loss.yaml").write_text("model.losses+: {class_path: ZLoss, init_args: {weight: 1.0e-4}}")
    Path("other.yaml").write_text("model.block.attention.edits-: RoPE\nmodel.head.softcap: 0.01")
    same = measured(capsys, "--config", "z_loss.yaml")  # an auxiliary loss never enters val/loss
    assert float(same["val/loss"]) == pytest.approx(loss, rel=1e-5)
    assert same["val/tokens"] == "100"
    other = measured(capsys, "--config", "other.yaml")
    assert other["val/tokens"] == "100"
    assert abs(loss - math.log(320)) > 2e-3
    assert float(other["val/loss"]) == pytest.approx(math.log(320), abs=1e-3)
    assert measured(capsys, "--config", "other.yaml", "--data.val_tokens", "50")["val/tokens"] == "50"


def test_what_lies_below_a_difference(
    home: Path, trained: subprocess.CompletedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)

    def tree(*argv: str) -> dict:
        return from_arguments(argv, below=checkpoint_layer).tree

    Path("mine.yaml").write_text(f"model.losses+: ZLoss\nckpt_path: {CHECKPOINT}")
    saved = load_text(Path("logs/t/0/config.yaml").read_text(), "x")
    merged = tree("--config", "mine.yaml", "--data.source.val", "[other.bin]")
    assert merged["model"]["init_args"].pop("losses") == ["ZLoss"]
    assert saved["model"]["init_args"].pop("losses") is None
    assert merged["model"] == saved["model"]
    assert merged["data"]["source"]["init_args"]["train"] == ["train.bin"]
    assert merged["data"]["source"]["init_args"]["val"] == ["other.bin"]
    assert set(merged) == {"seed_everything", "model", "data", "trainer", "ckpt_path"}
    for own in (["--config", "base.yaml"], ["--model", "BlaGPT"], ["--model.class_path=BlaGPT"]):
        assert tree("--ckpt_path", CHECKPOINT, *own) == {**tree(*own), "ckpt_path": CHECKPOINT}, "replaced as a whole"
    Path("again.yaml").write_text("model.block.attention.edits: [RoPE]")
    with pytest.raises(ConfigError, match=r"again.yaml: changes nothing here"):
        tree("--ckpt_path", CHECKPOINT, "--config", "again.yaml")


def test_an_interrupt_before_training_leaves_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning turns it into an exit with 1."""

    def interrupted(command: str, argv: list[str]) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setitem(cli.COMMANDS, "fit", interrupted)
    monkeypatch.setattr(sys, "argv", ["blagpt", "fit"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
