"""A parser that hands its complaint on instead of printing its usage; `explain` turns it into one to three lines."""

from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class Complaint(SystemExit):
    """jsonargparse's own words about the innermost thing that is wrong; a SystemExit, since it catches all else."""


class FriendlyParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are exceptions."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Complaint(message)
