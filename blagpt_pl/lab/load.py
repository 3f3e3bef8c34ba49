"""A trained model from its checkpoint alone: the configuration travels in the file, as text."""

from pathlib import Path
from typing import Any

from blagpt_pl.callbacks.atomic_io import read_checkpoint
from blagpt_pl.data.tokenizers import Tokenizer
from blagpt_pl.errors import CheckpointError
from blagpt_pl.lab import parts
from blagpt_pl.lab.strict_yaml import load_text
from blagpt_pl.lab.train import BlagptCLI
from blagpt_pl.lab.without_donor import without_donor
from blagpt_pl.lm import LanguageModel


def checkpoint_of(path: str) -> Path:
    """The checkpoint that a path means: a file, or the best one of a run's folder (the last, if none is best).

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    if given.is_dir():
        for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "best.ckpt", "last.ckpt"):
            if (given / name).is_file():
                return given / name
        raise CheckpointError(
            f"{given}: holds no checkpoints/best.ckpt or checkpoints/last.ckpt; fix: name a run's folder"
        )
    return given


def load(path: str) -> tuple[LanguageModel, Tokenizer, dict[str, Any]]:
    """The model in eval mode on the CPU, its tokenizer, and the checkpoint.

    Raises:
        CheckpointError: the file is no checkpoint of this program, or does not fit its own configuration.
    """
    file = checkpoint_of(path)
    checkpoint = read_checkpoint(file)
    config = load_text(checkpoint.get("config", ""), str(file))
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: carries no configuration, so the model cannot be rebuilt")
    parts.import_all()
    wanted = {key: without_donor(config[key]) for key in ("model", "data") if key in config}
    cli = BlagptCLI("fit", wanted, run=False)
    try:
        cli.model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{file}: does not fit its own configuration: {str(error).splitlines()[1].strip()}"
        ) from None
    return cli.model.eval(), cli.datamodule.tokenizer, checkpoint
