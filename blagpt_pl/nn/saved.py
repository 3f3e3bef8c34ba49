"""The one place that reads a checkpoint file: as data (`weights_only=True`), its tensors on disk until they are used."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from blagpt_pl.errors import CheckpointError


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint file.

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
