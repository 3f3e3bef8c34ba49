"""SIGTERM and SIGINT, to one process or to all, on one rank and on two: saved, gone, and the same command goes on exactly."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import scalars

LONG = (
    "--trainer.max_steps", "150", "--trainer.val_check_interval", "50", "--trainer.log_every_n_steps", "5",
    "--samples.max_new_tokens", "0", "--checkpoint.every_n_steps", "10",
)  # fmt: skip
DDP2 = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_a_checkpoint(folder: Path, seconds: float = 120) -> None:
    """Wait until the run is under way and has saved once."""
    end = time.monotonic() + seconds
    while not (folder / "checkpoints/last.ckpt").is_file():
        assert time.monotonic() < end, f"{folder}: nothing saved within {seconds} s"
        time.sleep(0.01)


def assert_uninterrupted(folder: Path, reference: Path) -> None:
    """One run folder; the same weights to the bit; each step logged once, with the same values."""
    assert [p.name for p in folder.parent.iterdir()] == ["0"]
    ours, theirs = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (folder, reference))
    assert all(torch.equal(ours["state_dict"][k], v) for k, v in theirs["state_dict"].items())
    curve, whole = scalars(folder), scalars(reference)
    for tag in ("train/loss", "val/loss", "grad_norm", "lr"):
        assert [step for step, _ in curve[tag]] == [step for step, _ in whole[tag]]
        assert [v for _, v in curve[tag]] == pytest.approx([v for _, v in whole[tag]], rel=1e-6)


@pytest.fixture(scope="module")
def reference(run: Callable, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    run(folder, "fit", "--config", str(config), *LONG)
    return folder / "logs/tiny/0"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "whom", "flags"),
    [
        (signal.SIGTERM, "main", ()),
        (signal.SIGINT, "main", ()),
        (signal.SIGTERM, "all", DDP2),
        (signal.SIGINT, "all", DDP2),
        (signal.SIGTERM, "child", DDP2),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    blagpt: Callable, run: Callable, config: Path, reference: Path, tmp_path: Path, number: int, whom: str, flags: tuple
) -> None:
    words = ("fit", "--config", str(config), *LONG, *flags)
    process = blagpt(tmp_path, *words)
    folder = tmp_path / "logs/tiny/0"
    wait_for_a_checkpoint(folder)
    offspring = children(process.pid)
    for pid in {"main": [process.pid], "all": [process.pid, *offspring], "child": offspring}[whom]:
        os.kill(pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "stopped"
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == status["step"] > 0

    out, _ = run(tmp_path, *words)
    assert f"(step {status['step']})" in out
    assert_uninterrupted(folder, reference)


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    blagpt: Callable, run: Callable, config: Path, reference: Path, tmp_path: Path
) -> None:
    """What it logged after that checkpoint is taken back, so that each step stands in the curve once."""
    words = ("fit", "--config", str(config), *LONG)
    process = blagpt(tmp_path, *words)
    folder = tmp_path / "logs/tiny/0"
    wait_for_a_checkpoint(folder)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    out, _ = run(tmp_path, *words)
    assert "resuming from" in out
    assert_uninterrupted(folder, reference)


def test_a_finished_run_is_not_resumed_but_followed_by_another(run: Callable, config: Path, tmp_path: Path) -> None:
    words = ("fit", "--config", str(config), "--trainer.max_steps", "6", "--samples.max_new_tokens", "0")
    run(tmp_path, *words)
    before = (tmp_path / "logs/tiny/0/result.json").read_text()
    out, _ = run(tmp_path, *words)
    assert "resuming" not in out
    assert sorted(p.name for p in (tmp_path / "logs/tiny").iterdir()) == ["0", "1"]
    assert (tmp_path / "logs/tiny/0/result.json").read_text() == before
    assert len((tmp_path / "logs/results.jsonl").read_text().splitlines()) == 2
