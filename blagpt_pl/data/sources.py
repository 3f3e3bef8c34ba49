"""Where shards come from: the socket of the data module that knows files, and its plainest part.

A source is fetched on one process of each node, then asked for its files on every process. Its constructor does no I/O,
so that a configuration can be read, printed and checked on a machine without the data.
"""

from abc import ABC, abstractmethod
from pathlib import Path

from blagpt_pl.data.shards import find_files
from blagpt_pl.data.tokenizers import Tokenizer


class Source(ABC):
    """Base of the sources: `tokenizer` is the one that wrote the shards."""

    tokenizer: Tokenizer

    @abstractmethod
    def fetch(self) -> None:
        """Make or download what is missing; what is there and whole is left alone."""

    @abstractmethod
    def train_files(self) -> list[Path]:
        """Shards to train on, in reading order."""

    @abstractmethod
    def val_files(self) -> list[Path]:
        """Shards to measure on: first the validation tokens, after them the test tokens."""


class ShardFiles(Source):
    """Shards that exist already, named by glob patterns relative to the current folder."""

    def __init__(self, train: list[str], val: list[str], tokenizer: Tokenizer) -> None:
        self.train = train
        self.val = val
        self.tokenizer = tokenizer

    def fetch(self) -> None:
        """Nothing to fetch: a missing file is an error of `train_files` or `val_files`."""

    def train_files(self) -> list[Path]:
        return find_files(self.train, "data.source.init_args.train")

    def val_files(self) -> list[Path]:
        return find_files(self.val, "data.source.init_args.val")
