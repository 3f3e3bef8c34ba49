"""Where a run lives: resumed only when it is the same, unfinished and not alive; never overwritten."""

import fcntl
import json
import multiprocessing
from pathlib import Path

import pytest

from blagpt_pl.callbacks.run_logger import RunLogger
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import runs
from blagpt_pl.lab.runs import Run, choose, fresh, is_alive, numbered, status_of

CONFIG = "name: a\n"


def made(root: Path, k: int, state: str | None = "running", config: str = CONFIG, saved: bool = True) -> Path:
    """A run's folder as a process leaves it."""
    folder = root / "a" / str(k)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / ".lock").write_text("1")
    if state is not None:
        (folder / "status.json").write_text(json.dumps({"state": state, "step": 3, "pid": 1}))
    if saved:
        (folder / "checkpoints" / "last.ckpt").write_text("x")
    return folder


def test_the_first_run(tmp_path: Path) -> None:
    assert choose(tmp_path, "a", CONFIG) == Run(tmp_path / "a" / "0", None)
    assert not any(tmp_path.iterdir()), "choosing only reads"


@pytest.mark.parametrize("state", runs.UNFINISHED)
def test_an_unfinished_run_resumes(tmp_path: Path, state: str) -> None:
    folder = made(tmp_path, 0, state)
    assert choose(tmp_path, "a", CONFIG) == Run(folder, folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize("state", ["finished", "diverged", None])
def test_any_other_state_does_not(tmp_path: Path, state: str | None) -> None:
    made(tmp_path, 0, state)
    assert choose(tmp_path, "a", CONFIG) == Run(tmp_path / "a" / "1", None)


def test_another_config_or_no_checkpoint_does_not(tmp_path: Path) -> None:
    made(tmp_path, 0)
    assert choose(tmp_path, "a", "name: a\nseed_everything: 2\n") == Run(tmp_path / "a" / "1", None)
    made(tmp_path, 4, saved=False)
    assert choose(tmp_path, "a", CONFIG) == Run(tmp_path / "a" / "5", None)


def test_only_the_newest_run_resumes(tmp_path: Path) -> None:
    made(tmp_path, 2)
    made(tmp_path, 10, "finished")
    assert choose(tmp_path, "a", CONFIG) == Run(tmp_path / "a" / "11", None)


def test_a_run_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert is_alive(folder)
        assert choose(tmp_path, "a", CONFIG) == Run(tmp_path / "a" / "1", None)
    assert not is_alive(folder)
    assert choose(tmp_path, "a", CONFIG).folder == folder


def test_asking_takes_no_lock(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    assert not is_alive(folder)
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("text", ["", "{", "null", "[1]", "3", '"running"', "\x00"])
def test_a_damaged_status_is_no_status(tmp_path: Path, text: str) -> None:
    folder = made(tmp_path, 0)
    (folder / "status.json").write_text(text)
    assert status_of(folder) == {}
    assert choose(tmp_path, "a", CONFIG).resume is None


def test_a_status_that_is_not_text(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    (folder / "status.json").write_bytes(b"\xff\xfe")
    assert status_of(folder) == {}


def test_only_folders_with_numbers_are_runs(tmp_path: Path) -> None:
    for name in ("3", "007", "²", "x", "-1", "1.5", "9.bad"):
        (tmp_path / "a" / name).mkdir(parents=True)
    (tmp_path / "a" / "8").write_text("a file")
    assert numbered(tmp_path, "a") == [3]
    assert fresh(tmp_path, "a") == tmp_path / "a" / "4"
    assert numbered(tmp_path, "b") == []


def test_two_claims_at_once_get_two_folders(tmp_path: Path) -> None:
    chosen = [choose(tmp_path, "a", CONFIG) for _ in range(3)]
    assert len({run.folder for run in chosen}) == 1
    loggers = [RunLogger(run.folder, CONFIG) for run in chosen]
    for logger in loggers:
        logger._claim()
    assert [Path(logger.log_dir).name for logger in loggers] == ["0", "1", "2"]
    assert all(is_alive(tmp_path / "a" / k) for k in "012")


def test_a_file_in_the_way_is_stepped_over(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0").write_text("a file")
    logger = RunLogger(choose(tmp_path, "a", CONFIG).folder, CONFIG)
    logger._claim()
    assert Path(logger.log_dir).name == "1"
    assert (tmp_path / "a" / "0").read_text() == "a file"


def _claim_and_wait(root: Path, barrier: object, names: object) -> None:
    folder = choose(root, "a", CONFIG).folder
    barrier.wait()
    logger = RunLogger(folder, CONFIG)
    logger._claim()
    names.put(Path(logger.log_dir).name)
    barrier.wait()


def test_eight_starts_at_once_get_eight_folders(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, names = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_claim_and_wait, args=(tmp_path, barrier, names)) for _ in range(8)]
    for process in processes:
        process.start()
    found = {names.get(timeout=20) for _ in processes}
    for process in processes:
        process.join(20)
    assert found == set("01234567")
    assert all((tmp_path / "a" / k / "config.yaml").read_text() == CONFIG for k in found)
    assert not any(is_alive(tmp_path / "a" / k) for k in found), "a lock dies with its process"


def test_a_live_run_is_not_resumed_twice(tmp_path: Path) -> None:
    folder = made(tmp_path, 0)
    first, second = RunLogger(folder, CONFIG, 3), RunLogger(folder, CONFIG, 3)
    first._claim()
    with pytest.raises(ConfigError, match=r"in use by process \d+; fix: another --name"):
        second._claim()
