"""The `blagpt` command: help without imports, exit codes, one line for each mistake, silence when all is well.

Processes are slow to start, so what can be asked in this one is, and each process answers several questions.
"""

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


def test_a_healthy_run_is_quiet_and_its_config_runs_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done = blagpt(home, "fit", "--config", "base.yaml")
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stderr + done.stdout).lower()
    assert len(done.stderr.splitlines()) <= 3, done.stderr
    assert "finished: step 2 of 2" in done.stdout
    folder = home / "logs" / "t" / "0"
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    saved = folder / "config.yaml"
    monkeypatch.chdir(home)
    assert asked(capsys, "fit", "--config", str(saved), "--print_config") == saved.read_text()


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
