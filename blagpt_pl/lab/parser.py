"""A parser that hands its complaint on instead of printing its usage; `explain` turns it into one to three lines.

A bare name means the part of the house that has it, also where a library has loaded a class of the same name (`Muon`), as in
everything else here that reads a configuration; jsonargparse would call it ambiguous. HeavyBall's classes have no bare names,
since most are torch's, too (`AdamW`), and which are known would depend on who has imported it. jsonargparse offers no way to
say so, hence `house_first`, for the version that pyproject.toml pins.
"""

from typing import NoReturn

import jsonargparse._typehints
from lightning.pytorch.cli import LightningArgumentParser

_all_paths = jsonargparse._typehints.get_all_subclass_paths


def house_first(cls: type, **options: bool) -> list[str]:
    """Full names of the classes of a kind, without HeavyBall's and those that are named like one of the house."""
    found = [path for path in _all_paths(cls, **options) if not path.startswith("heavyball.")]
    ours = {path.rpartition(".")[2] for path in found if path.startswith("blagpt_pl.")}
    return [path for path in found if path.startswith("blagpt_pl.") or path.rpartition(".")[2] not in ours]


jsonargparse._typehints.get_all_subclass_paths = house_first


class Complaint(SystemExit):
    """jsonargparse's own words about the innermost thing that is wrong; a SystemExit, since it catches all else."""


class FriendlyParser(LightningArgumentParser):
    """LightningArgumentParser whose errors are exceptions."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise Complaint(message)
