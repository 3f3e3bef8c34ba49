"""Checkpoint files that are whole or absent: written beside their target, flushed to disk, then renamed over it.

Lightning writes to the system's temporary folder and moves, which is a copy (and can be cut short) when that folder is on
another file system, and it swallows a PermissionError. Here every failure is an error and the previous file stays.
A checkpoint is data: it is read with `weights_only=True`, whatever the environment says.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from blagpt_pl.errors import CheckpointError


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it over `path`.

    Raises:
        OSError: the file cannot be written; what was at `path` before is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # left by a process that was killed while writing
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file; tensors stay on disk until they are used.

    Raises:
        CheckpointError: the file is missing, cut short, not a checkpoint, or holds code.
    """
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"{file}: is a folder (expected one checkpoint file); fix: name the .ckpt file")
    if not file.is_file():
        raise CheckpointError(f"{file}: no such checkpoint (in {Path.cwd()})")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "class" in line), "code")
        raise CheckpointError(f"{file}: refused, it holds more than data ({reason.strip()[:120]})") from None
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise CheckpointError(f"{file}: damaged or not a checkpoint ({reason}); fix: use an earlier one") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{file}: not a checkpoint of this program (no `state_dict` in it)")
    return checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through `write_atomically`, reads through `read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path, map_location)
