"""A healthy start says nothing: Lightning's banners, adverts and harmless warnings are filtered, its errors are not."""

import logging
import re
import warnings

BANNERS = (
    "Seed set to",
    "GPU available",
    "TPU available",
    "HPU available",
    "Using default `ModelCheckpoint`",
    "Using ",
    "💡 Tip",
    "`Trainer.fit` stopped",
    "Restored all states",
    "Restoring states",
    "Loaded model weights",
    "Initializing distributed",
    "distributed_backend",
    "All distributed processes registered",
    "------",
    "Trainer(",
    "You are using a CUDA device",
    "LOCAL_RANK",
    "Detected KeyboardInterrupt",
    "`Trainer(",
)
HARMLESS = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*not resumable.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*number of training batches.*is smaller than the logging interval.*",
    r".*Your `IterableDataset` has `__len__` defined.*",
    r".*GPU available but not used.*",
    r".*Learning rate changed between steps.*",
    r".*epoch parameter in `scheduler.step\(\)`.*",
    r".*You called `self.log\('step', \.\.\.\)`.*",
    r".*The ``compute`` method of metric Ruler was called before the ``update`` method.*",
    r".*barrier\(\): using the device under current context.*",
    r".*It is recommended to use `self.log\(.*",  # the ruler has already added up over ranks
    r".*The `srun` command is available.*",
)


def quiet() -> None:
    """Install the filters; call it after Lightning has been imported, since it sets its log levels then."""

    def wanted(record: logging.LogRecord) -> bool:
        text = re.sub(r"^\[rank: \d+\] ", "", record.getMessage().strip())
        return bool(text) and not text.startswith(BANNERS)

    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logger = logging.getLogger(name)
        logger.addFilter(wanted)
        for handler in logger.handlers:
            handler.addFilter(wanted)
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message=message)
