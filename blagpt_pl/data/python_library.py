"""Python's own standard library as bytes: a corpus every machine has, for the quickstart and for tests.

What     the .py files under `sysconfig`'s stdlib path, without installed packages, tests and IDLE; each file's bytes
         after one end-of-text token (256); about 11 million tokens
Split    by sha256 of the relative path: the lowest `val_percent` percent of hashes are validation; order by hash
Differs  from a benchmark corpus: another Python version is another corpus (its shards have a folder of their own), so
         losses compare within one version only
Cost     no network; two seconds, once
"""

import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blagpt_pl.data.shards import Shard, write_shard
from blagpt_pl.data.sources import Source
from blagpt_pl.data.tokenizers import ByteTokenizer
from blagpt_pl.errors import ConfigError, DataError

LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


class PythonLibrary(Source):
    """The running Python's standard library, tokenised to bytes."""

    def __init__(self, root: str = "data/python_library", val_percent: int = 5) -> None:
        if not 1 <= val_percent <= 50:
            raise ConfigError(f"data.source.init_args.val_percent: {val_percent} (expected 1 to 50); fix: 5")
        self.root = Path(root)
        self.val_percent = val_percent
        self.tokenizer = ByteTokenizer()

    def _shard(self, split: str, percent: int) -> Path:
        return self.root / platform.python_version() / f"python_{split}_{percent:02d}.bin"

    def train_files(self) -> list[Path]:
        return [self._shard("train", 100 - self.val_percent)]

    def val_files(self) -> list[Path]:
        return [self._shard("val", self.val_percent)]

    def fetch(self) -> None:
        try:
            for path in (*self.train_files(), *self.val_files()):
                Shard.open(path)
        except DataError:  # missing or damaged: both are written again, so that they are two parts of one whole
            self._write(Path(sysconfig.get_path("stdlib")))

    def _write(self, library: Path) -> None:
        names = [
            path.relative_to(library) for path in library.rglob("*.py") if path.is_file() and not path.is_symlink()
        ]
        names = [name for name in names if not LEFT_OUT & set(name.parts)]
        by_hash = sorted((hashlib.sha256(name.as_posix().encode()).hexdigest(), name) for name in names)
        parts: dict[bool, list[np.ndarray]] = {False: [], True: []}  # is validation: token arrays
        end_of_text = np.array([self.tokenizer.end_of_text], np.uint16)
        for digest, name in tqdm(by_hash, "python library", unit=" files", delay=2):
            is_val = int(digest[:8], 16) * 100 < self.val_percent * 2**32
            parts[is_val] += [end_of_text, np.frombuffer((library / name).read_bytes(), np.uint8).astype(np.uint16)]
        for is_val, (path,) in ((False, self.train_files()), (True, self.val_files())):
            if not parts[is_val]:
                raise DataError(
                    f"data: {library}: no .py file for {path.name} (expected Python's own); fix: use ShardFiles"
                )
            write_shard(path, np.concatenate(parts[is_val]), self.tokenizer.vocab_size)
