"""A checkpoint file is whole or absent, whatever goes wrong while it is written."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO, read_checkpoint, write_atomically
from blagpt_pl.errors import CheckpointError

GOOD = {"state_dict": {"w": torch.arange(50_000.0)}, "global_step": 3}


def test_round_trip(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(GOOD, tmp_path / "deep" / "a.ckpt")
    assert torch.equal(io.load_checkpoint(tmp_path / "deep" / "a.ckpt")["state_dict"]["w"], GOOD["state_dict"]["w"])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.ckpt"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, file)
    before = file.read_bytes()

    def fail(target: object) -> None:
        target.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        write_atomically(file, fail)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    file = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(GOOD, file)
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises((OSError, RuntimeError)):
            AtomicCheckpointIO().save_checkpoint(GOOD, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_killed_writer_leaves_a_readable_file(tmp_path: Path) -> None:
    """A process that saves without pause is killed again and again; the file is whole every time, and litter is cleared."""
    file = tmp_path / "a.ckpt"
    code = (
        "import torch, sys\n"
        "from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO\n"
        "io, step = AtomicCheckpointIO(), 0\n"
        "while True:\n"
        "    step += 1\n"
        f"    io.save_checkpoint({{'state_dict': {{'w': torch.full((300000,), float(step))}}, 'global_step': step}}, {str(file)!r})\n"
    )
    for i in range(4):
        process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        end = time.monotonic() + 60
        while not file.is_file() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.4 + 0.0137 * i if i else 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        content = read_checkpoint(file)
        assert content["state_dict"]["w"].unique().tolist() == [content["global_step"]]
    AtomicCheckpointIO().save_checkpoint(GOOD, file)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("damage", ["missing", "folder", "empty", "cut", "text", "list", "code"])
def test_what_is_no_checkpoint_is_told_by_name(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = tmp_path / "a.ckpt"
    marker = tmp_path / "marker"
    AtomicCheckpointIO().save_checkpoint(GOOD, file)
    if damage == "missing":
        file.unlink()
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    elif damage == "list":
        torch.save([1, 2], file)
    elif damage == "code":

        class Evil:
            def __reduce__(self) -> tuple:
                return os.system, (f"touch {marker}",)

        torch.save({"state_dict": {}, "x": Evil()}, file)
    else:
        whole = file.read_bytes()
        file.write_bytes({"empty": b"", "cut": whole[: len(whole) // 3], "text": b"not a checkpoint"}[damage])
    with pytest.raises(CheckpointError, match="a.ckpt: "):
        read_checkpoint(file)
    assert not marker.exists()
