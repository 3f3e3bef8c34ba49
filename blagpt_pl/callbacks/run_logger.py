"""TensorBoard in the run's own folder, which it claims when Lightning first asks for it: after the data has been checked.

Claiming creates `logs/<name>/<k>/` (the folder's creation decides between two runs that start at once), locks it for as
long as the process lives, and writes the resolved configuration.
"""

import fcntl
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from blagpt_pl.errors import ConfigError


class RunLogger(TensorBoardLogger):
    """Scalars and samples of one run.

    Args:
        folder: `logs/<name>/<k>`; a new run takes the next free `<k>` if this one is taken.
        config: the resolved configuration, as text.
        resumed_step: the step that the run goes on from, or None for a new run. Events of later steps are taken back.
    """

    def __init__(self, folder: Path, config: str, resumed_step: int | None = None) -> None:
        purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
        super().__init__(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False, **purge)
        self.config = config
        self.resumed = resumed_step is not None
        self._lock: TextIO | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The SummaryWriter; the first call claims the folder."""
        if self._lock is None:
            self._claim()
        return super().experiment

    def _claim(self) -> None:
        while not self.resumed:
            folder = Path(self.log_dir)
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
                break
            except FileExistsError:
                self._version = str(int(self._version) + 1)
        folder = Path(self.log_dir)
        self._lock = (folder / ".lock").open("a+")
        for patience in range(20, -1, -1):  # another rank may be looking whether the run is alive
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
                if not patience:
                    self._lock.seek(0)
                    owner = self._lock.read().strip()
                    raise ConfigError(f"{folder}: in use by process {owner}; fix: another --name") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        if not self.resumed:
            (folder / "config.yaml").write_text(self.config)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """All scalars in one event: each event wakes the thread that writes, which costs more than the scalar."""
        if step is None or not all(isinstance(value, float | int | Tensor) for value in metrics.values()):
            super().log_metrics(metrics, step)
        elif metrics:
            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
            self.experiment.file_writer.add_summary(Summary(value=values), step)

    def save(self) -> None:
        """Nothing beside the events: there are no hyper-parameters apart from config.yaml."""
