"""The same text byte by byte: token shards of a byte-level BPE, spelt out as shards of bytes.

What     for each shard of a source one shard here, of the same documents in the same order: end of text becomes 256,
         every other token its UTF-8 bytes. A model of bytes trained on these and a model of tokens trained on those
         read the same text, so their `val/bpb` compare: both divide nats by the same bytes, and both count the nats of
         end of text, which has no bytes
Origin   beside NAME.bin, NAME.bin.origin holds which tokens it was made of: their number, the sampled digest that data
         fingerprints are made of (`ShardSet.digests`: it can miss a few tokens edited in place), the tokenizer. Where
         these agree, nothing is written
Formula  byte j of the text is flat[begin(x_i) + j - e_i] for e_i <= j < e_(i + 1), e_i = the bytes of all tokens before
         token i, `flat` the bytes of all ids one after the other
Differs  from tokenising the text anew: none is needed, and the split into documents, shards, training and validation stays
Cost     4 to 5 bytes of text a token of GPT-2's, 2 bytes of disk each: 100 M tokens (200 MB) become about 0.9 GB, all of
         FineWeb-10B about 90 GB. Once; a chunk of tokens at a time is in memory
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from blagpt_pl.data.fineweb import is_whole
from blagpt_pl.data.shards import Shard, ShardSet, write_pieces
from blagpt_pl.data.sources import Source
from blagpt_pl.data.tokenizers import ByteTokenizer, Tokenizer
from blagpt_pl.errors import ConfigError, DataError

CHUNK_TOKENS = 2**18  # about 1.1 MB of text, and twenty times that while it is gathered


class AsBytes(Source):
    """Another source's text as bytes: its shards spelt out, kept in `root`, in a folder named as the one they are in.

    Raises:
        ConfigError: the source's tokenizer cannot say the bytes of its tokens, or its tokens are bytes already.
    """

    def __init__(self, source: Source, root: str = "data/bytes") -> None:
        if isinstance(source.tokenizer, ByteTokenizer):
            raise ConfigError(
                f"data.source.init_args.source: the shards of {type(source).__name__} are bytes already (expected "
                f"tokens); fix: name it in data.source itself"
            )
        if type(source.tokenizer).token_bytes is Tokenizer.token_bytes:
            raise _no_bytes(source.tokenizer)
        self.source = source
        self.root = Path(root)
        self.tokenizer = ByteTokenizer()

    def train_files(self) -> list[Path]:
        return [self._file(path) for path in self.source.train_files()]

    def val_files(self) -> list[Path]:
        return [self._file(path) for path in self.source.val_files()]

    def _file(self, origin: Path) -> Path:
        return self.root / os.path.basename(os.path.dirname(os.path.abspath(origin))) / origin.name

    def fetch(self) -> None:
        """Fetch the tokens; write what is missing, damaged, or made of other tokens than there are now.

        Raises:
            ConfigError: two shards would have one name, one would replace its own tokens, or the tokenizer has no bytes.
            DataError: a shard of tokens is damaged or holds an id beyond the vocabulary, or the disk refuses.
        """
        self.source.fetch()
        origins = self._origins()
        shards = {path: Shard.open(origin) for path, origin in origins.items()}
        if all(self._is_current(path, shard) for path, shard in shards.items()):
            return
        with _alone(self.root):
            table = _Table(self.source.tokenizer)
            for number, (path, shard) in enumerate(shards.items(), 1):
                if not self._is_current(path, shard):  # another process may just have written it
                    self._write(path, shard, table, f"{shard.path.name} as bytes, {number} of {len(shards)}")

    def _origins(self) -> dict[Path, Path]:
        """For each file of ours the file that it is made of."""
        origins: dict[Path, Path] = {}
        sources = [*self.source.val_files(), *self.source.train_files()]
        real = {origin.resolve() for origin in sources}
        for origin in sources:
            path = self._file(origin)
            if path.resolve() in real:
                raise ConfigError(
                    f"data.source.init_args.root: {path} is a shard of tokens (expected a folder apart from them); "
                    f"fix: name another folder"
                )
            if origins.setdefault(path, origin).resolve() != origin.resolve():
                raise ConfigError(
                    f"data.source.init_args.source: {origins[path]} and {origin} would both become {path} (expected "
                    f"another file name, or another name of its folder); fix: rename one of them"
                )
        return origins

    def _origin(self, shard: Shard) -> str:
        """What is written beside the bytes of a shard of tokens."""
        (digest,) = ShardSet([shard]).digests()
        tokenizer = self.source.tokenizer
        return f"{shard.n_tokens} tokens, sha256 {digest}, {type(tokenizer).__name__} of {tokenizer.vocab_size}\n"

    def _is_current(self, path: Path, shard: Shard) -> bool:
        note = _note(path)
        return is_whole(path) and note.is_file() and note.read_bytes() == self._origin(shard).encode()

    def _write(self, path: Path, shard: Shard, table: "_Table", title: str) -> None:
        origin = self._origin(shard)
        try:
            _note(path).unlink(missing_ok=True)  # first: a note tells of the bytes beside it, or is not there
            with tqdm(total=shard.n_tokens, desc=title, unit=" tokens", unit_scale=True, delay=2, leave=False) as bar:
                write_pieces(path, self._spelt(shard, table, bar), self.tokenizer.vocab_size)
            _note(path).write_text(origin)
        except OSError as error:
            raise DataError(
                f"data: {_note(path)}: {error.strerror} (expected to write it); fix: free or change the folder"
            ) from error

    def _spelt(self, shard: Shard, table: "_Table", bar: tqdm) -> Iterator[np.ndarray]:
        """The bytes of a shard, a chunk of tokens at a time."""
        shards = ShardSet([shard], self.source.tokenizer.vocab_size)  # refuses ids beyond it, by file and index
        for start in range(0, shard.n_tokens, CHUNK_TOKENS):
            tokens = np.empty(min(CHUNK_TOKENS, shard.n_tokens - start), np.int64)
            shards.read(start, tokens)
            yield table.spell(tokens)
            bar.update(tokens.size)


class _Table:
    """The bytes of every id, one after the other, and where each id's begin."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = tokenizer.token_bytes()
        if texts is None or len(texts) != tokenizer.vocab_size:
            raise _no_bytes(tokenizer)
        end = tokenizer.end_of_text
        texts = [*texts[:end], b"\0", *texts[end + 1 :]]  # one place, for the symbol that is no byte
        self.lengths = np.array([len(text) for text in texts], np.int64)  # (V,)
        self.begins = self.lengths.cumsum() - self.lengths  # (V,)
        self.flat = np.frombuffer(b"".join(texts), np.uint8).astype(np.uint16)
        self.flat[self.begins[end]] = ByteTokenizer.end_of_text

    def spell(self, tokens: np.ndarray) -> np.ndarray:
        """(n,) ids -> the bytes of all of them, uint16."""
        lengths = self.lengths[tokens]  # (n,)
        ends = lengths.cumsum()  # (n,)
        places = np.repeat(self.begins[tokens] - (ends - lengths), lengths)  # (bytes,)
        places += np.arange(places.size)
        return self.flat[places]


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.origin")


def _no_bytes(tokenizer: Tokenizer) -> ConfigError:
    return ConfigError(
        f"data.source.init_args.source: {type(tokenizer).__name__} cannot say the bytes of its tokens (expected a "
        f"tokenizer whose token_bytes() has an entry for each id); fix: name a source of such tokens, as GPT-2's are"
    )


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Hold `root` for one process; what a killed one left half written is removed."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise DataError(
            f"data: {root}: {error.strerror} (expected a folder to write to); fix: data.source.init_args.root"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for part in root.glob("*/.*.part"):
            part.unlink(missing_ok=True)
        yield
