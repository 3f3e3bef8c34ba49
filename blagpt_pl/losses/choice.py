"""The implementations of the next-token loss by the word that a configuration names them with."""

from typing import Literal

from blagpt_pl.losses.chunked import Chunked
from blagpt_pl.losses.liger import Liger
from blagpt_pl.losses.next_token import Full, NextToken

LossName = Literal["chunked", "full", "liger"]
KINDS: dict[str, type[NextToken]] = {"chunked": Chunked, "full": Full, "liger": Liger}


def loss_named(name: str) -> NextToken:
    """The implementation of that name.

    Raises:
        ValueError: there is none, or it cannot run here.
    """
    if name not in KINDS:
        raise ValueError(f"model.loss: {name!r} (expected one of {', '.join(KINDS)})")
    return KINDS[name]()
