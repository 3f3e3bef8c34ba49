"""Where a run lives: `logs/<name>/<k>/`, chosen by reading, claimed by creating.

The same command after a crash resumes: if the newest run of that name has the same configuration, is not finished, is not
alive, and has a checkpoint, it goes on there. Anything else starts a new `<k>`; nothing is ever overwritten. Every rank
chooses from the same files before the first of them claims, so all choose alike.
"""

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

UNFINISHED = ("running", "stopped", "failed")


@dataclass(frozen=True)
class Run:
    """A run's folder, and the checkpoint it goes on from, if any."""

    folder: Path
    resume: Path | None


def is_alive(folder: Path) -> bool:
    """Whether a process holds the run's lock."""
    try:
        with (folder / ".lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or one that this user may not read
        return False
    return False


def status_of(folder: Path) -> dict:
    """The content of the run's status.json, or an empty mapping."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def numbered(root: Path, name: str) -> list[int]:
    """The numbers of the runs of a name, ascending."""
    names = [p.name for p in (root / name).glob("*") if p.is_dir()]
    return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))


def fresh(root: Path, name: str) -> Path:
    """The folder that the next new run of a name would have."""
    numbers = numbered(root, name)
    return root / name / str(numbers[-1] + 1 if numbers else 0)


def choose(root: Path, name: str, config: str) -> Run:
    """The run that a command belongs to.

    Args:
        root: the folder of all runs.
        name: the run's name.
        config: its resolved configuration.
    """
    numbers = numbered(root, name)
    if numbers:
        newest = root / name / str(numbers[-1])
        last = newest / "checkpoints" / "last.ckpt"
        saved = newest / "config.yaml"
        unfinished = status_of(newest).get("state") in UNFINISHED
        if unfinished and last.is_file() and saved.is_file() and saved.read_text() == config and not is_alive(newest):
            return Run(newest, last)
    return Run(fresh(root, name), None)
