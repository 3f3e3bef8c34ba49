"""Token shards: the file format of llm.c and modded-nanogpt, read and written.

Source   llm.c `dev/data/data_common.py` and `llmc/dataloader.h` (Karpathy 2024); modded-nanogpt
Format   256 little-endian int32 (magic, version, token count, zeros), then the tokens, little-endian:
         magic 20240520, version 1, uint16: vocabularies up to 65,535 · magic 20240801, version 7, uint32: larger ones
Differs  a file appears under its name only when it is whole (temporary file beside it, fsync, rename), and each file is
         checked against its header; reads go through `preadv`, so a file that shrinks during training is an error
         message, where a memory map would be a SIGBUS without one. Asking for the file's size before each batch would
         not do: it may shrink between the question and the read
Cost     1 KiB a file; one system call for all windows that follow one another, so one a batch in the order of the
         files, one a window in any other (and one more where a file ends)
"""

import glob
import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import numpy as np

from blagpt_pl.errors import DataError

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
PAGE_BYTES = 4096
SAMPLED_PAGES = 16
FORMATS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}  # magic: (version, dtype)


@dataclass(frozen=True)
class Shard:
    """One file of tokens that was whole when it was opened."""

    path: Path
    n_tokens: int
    dtype: np.dtype

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Shard":
        """Check existence, magic, version and size against the header; read no tokens."""
        path = Path(path)
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(HEADER_BYTES)
        except OSError as error:
            raise DataError(
                f"data: {path}: {error.strerror} (expected a token shard); fix: correct the path, or fetch the file"
            ) from error
        again, remake = "fix: delete it and fetch it again", "fix: re-create it with blagpt_pl.data.write_shard"
        if len(head) < HEADER_BYTES:
            raise DataError(
                f"data: {path}: {size} bytes (expected {HEADER_BYTES} of header at least): partial download; {again}"
            )
        magic, version, n_tokens = (int(i) for i in np.frombuffer(head, "<i4", count=3))
        if magic not in FORMATS:
            raise DataError(f"data: {path}: magic {magic} (expected 20240520 or 20240801); {remake}")
        expected_version, dtype = FORMATS[magic]
        if version != expected_version:
            raise DataError(f"data: {path}: version {version} (expected {expected_version}); {remake}")
        if n_tokens < 1:
            raise DataError(f"data: {path}: {n_tokens} tokens in the header (expected 1 or more); {again}")
        expected = HEADER_BYTES + n_tokens * dtype.itemsize
        if size != expected:
            why = "partial download" if size < expected else "bytes that the header does not count"
            raise DataError(f"data: {path}: {size} bytes (expected {expected} for {n_tokens} tokens): {why}; {again}")
        return cls(path, n_tokens, dtype)


def write_shard(path: str | os.PathLike, tokens: Sequence[int] | np.ndarray, vocab_size: int) -> Shard:
    """Write `tokens` in the form that `vocab_size` asks for; the name appears once the file is whole and on disk."""
    return write_pieces(path, [np.asarray(tokens).reshape(-1)], vocab_size)


def write_pieces(path: str | os.PathLike, pieces: Iterable[np.ndarray], vocab_size: int) -> Shard:
    """`write_shard` of rows of tokens that are joined, each let go once it is written.

    Raises:
        DataError: an id is outside the vocabulary, there are no tokens or too many for a header, or the disk refuses.
    """
    path = Path(path)
    magic = 20240520 if vocab_size <= 65535 else 20240801
    version, dtype = FORMATS[magic]
    header = np.zeros(HEADER_INTS, "<i4")
    n_tokens = 0
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.seek(HEADER_BYTES)
            for tokens in pieces:
                n_tokens += tokens.size
                if tokens.size:
                    _check_ids(path, tokens, vocab_size)
                    file.write(memoryview(np.ascontiguousarray(tokens, dtype)).cast("B"))
            if not 1 <= n_tokens < 2**31:
                raise DataError(
                    f"data: {path}: {n_tokens} tokens (expected 1 to {2**31 - 1}); fix: split them over several shards"
                )
            header[:3] = magic, version, n_tokens
            file.seek(0)
            file.write(header.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"data: {path}: {error.strerror} (expected to write {n_tokens} tokens); fix: free or change the folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return Shard.open(path)


def _check_ids(path: Path, tokens: np.ndarray, vocab_size: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"data: {path}: token ids {low} to {high} (expected 0 to {vocab_size - 1}); fix: the tokenizer's vocab_size"
        )


def find_files(patterns: Sequence[str], field: str) -> list[Path]:
    """The files that glob `patterns` match, sorted within each pattern; `field` is the setting an error names."""
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            raise DataError(
                f"data: no file matches {pattern!r} (cwd {os.getcwd()}); fix: correct {field}, or fetch the data first"
            )
        found += map(Path, matches)
    twice = [path for i, path in enumerate(found) if path in found[:i]]
    if twice:
        raise DataError(
            f"data: {twice[0]} matches two patterns of {field} (expected each file once); fix: narrow the patterns"
        )
    if not found:
        raise DataError(f"data: {field} is empty (expected one pattern or more); fix: name the shards in {field}")
    return found


class ShardSet:
    """Shards as one sequence of tokens. No id of `vocab_size` or above leaves it."""

    def __init__(self, shards: Sequence[Shard], vocab_size: int | None = None) -> None:
        assert shards, "a ShardSet needs a shard"
        self.shards = tuple(shards)
        self.vocab_size = vocab_size
        self.starts = [0, *itertools.accumulate(shard.n_tokens for shard in shards)]
        self.n_tokens = self.starts.pop()
        self._dtype = max((shard.dtype for shard in shards), key=lambda dtype: dtype.itemsize)
        self._narrow = {number for number, shard in enumerate(shards) if shard.dtype != self._dtype}
        self._descriptors: dict[int, int] = {}

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike], vocab_size: int | None = None) -> "ShardSet":
        return cls([Shard.open(path) for path in paths], vocab_size)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, one row of int32 or int64, with the tokens from `start` on."""
        self.read_windows(np.array([start]), out[None])

    def read_windows(self, starts: np.ndarray, out: np.ndarray) -> None:
        """Fill row i of `out`, (n, L) int32 or int64, with the tokens from `starts[i]` on.

        Rows that follow one another, each beginning with the last token of the one before, are read as one run.

        Raises:
            DataError: a file shrank or cannot be read, or a token is outside the vocabulary.
        """
        if not out.size:
            return
        n, length = out.shape
        ahead = length - 1  # from one window of a run to the next
        breaks = (starts[1:] - starts[:-1] != ahead).nonzero()[0] if ahead else np.arange(n - 1)
        if n > 1 and len(breaks) == n - 1:  # no two follow one another
            out[:] = self._tokens(starts.tolist(), [length] * n).reshape(n, length)
            return
        begins = [0, *(breaks + 1).tolist()] if len(breaks) else [0]
        rows = [b - a for a, b in pairwise([*begins, n])]
        tokens = self._tokens(starts[begins].tolist(), [r * ahead + 1 for r in rows])
        done = 0
        for row, r in zip(begins, rows, strict=True):
            size = tokens.itemsize  # windows overlap by a token: a view of the run, (r, L)
            out[row : row + r] = np.ndarray((r, length), tokens.dtype, tokens, size * done, (size * ahead, size))
            done += r * ahead + 1

    def _tokens(self, firsts: list[int], counts: list[int]) -> np.ndarray:
        """Runs of `counts[i]` tokens from `firsts[i]` on, one after the other, in the widest form of the files."""
        tokens = np.empty(sum(counts), self._dtype)
        size, view, fill = tokens.itemsize, memoryview(tokens).cast("B"), self._fill
        for number, index, begin, end in self._pieces(firsts, counts):
            if number not in self._narrow:
                fill(number, HEADER_BYTES + size * index, view[size * begin : size * end])
            else:
                piece = np.empty(end - begin, self.shards[number].dtype)
                fill(number, HEADER_BYTES + piece.itemsize * index, memoryview(piece).cast("B"))
                tokens[begin:end] = piece
        if self.vocab_size is not None and tokens.max() >= self.vocab_size:
            self._refuse(tokens, firsts, counts)
        return tokens

    def _pieces(self, firsts: list[int], counts: list[int]) -> Iterator[tuple[int, int, int, int]]:
        """Where the runs lie: (shard, index in it, begin, end), the last two being places in the runs joined."""
        starts, begin = self.starts, 0
        for first, count in zip(firsts, counts, strict=True):
            end = begin + count
            assert 0 <= first and first + count <= self.n_tokens, (
                f"tokens {first} to {first + count} of {self.n_tokens}"
            )
            number = bisect_right(starts, first) - 1
            index = first - starts[number]
            while index + end - begin > (n_tokens := self.shards[number].n_tokens):
                yield number, index, begin, begin + n_tokens - index
                number, index, begin = number + 1, 0, begin + n_tokens - index
            yield number, index, begin, end
            begin = end

    def _refuse(self, tokens: np.ndarray, firsts: list[int], counts: list[int]) -> NoReturn:
        """Name the file and the place of the first token that is outside the vocabulary."""
        at = int(np.argmax(tokens >= self.vocab_size))
        number, index, begin, _ = next(piece for piece in self._pieces(firsts, counts) if at < piece[3])
        raise DataError(
            f"data: {self.shards[number].path}: token id {tokens[at]} at index {index + at - begin} (expected < "
            f"{self.vocab_size}, the tokenizer's vocabulary); fix: name the tokenizer that wrote the file in "
            f"data.source, with model.vocab_size to match"
        )

    def fingerprint(self) -> str:
        """sha256 over (file name, token count, digest) of each shard in order. It samples (`digests`): it tells other
        files, another order and re-tokenised text apart, but can miss a few bytes edited in place."""
        lines = (f"{s.path.name} {s.n_tokens} {d}\n" for s, d in zip(self.shards, self.digests(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def digests(self) -> list[str]:
        """For each shard, sha256 of its header and of 16 pages of 4 KiB at even distances (64 KiB or less: all)."""
        return [self._digest(number) for number in range(len(self.shards))]

    def _digest(self, number: int) -> str:
        shard = self.shards[number]
        end = HEADER_BYTES + shard.n_tokens * shard.dtype.itemsize
        last = max(HEADER_BYTES, end - PAGE_BYTES)  # where the last page begins
        begins = {HEADER_BYTES + k * (last - HEADER_BYTES) // (SAMPLED_PAGES - 1) for k in range(SAMPLED_PAGES)}
        digest = hashlib.sha256()
        for begin, size in [(0, HEADER_BYTES), *((b, min(PAGE_BYTES, end - b)) for b in sorted(begins))]:
            page = bytearray(size)
            self._fill(number, begin, memoryview(page))
            digest.update(page)
        return digest.hexdigest()

    def _fill(self, number: int, offset: int, buffer: memoryview) -> None:
        """Read exactly `len(buffer)` bytes of shard `number`."""
        path = self.shards[number].path
        try:
            if number not in self._descriptors:
                self._descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            got = n = os.preadv(self._descriptors[number], (buffer,), offset)
            while got < len(buffer):  # a call reads 2 GiB at most, and less where it is interrupted or the file ends
                if n == 0:
                    size = os.fstat(self._descriptors[number]).st_size
                    raise DataError(
                        f"data: {path}: shrank to {size} bytes since it was opened (expected {offset + len(buffer)} at "
                        f"least); fix: fetch it again and resume"
                    )
                n = os.preadv(self._descriptors[number], (buffer[got:],), offset + got)
                got += n
        except OSError as error:
            raise DataError(
                f"data: {path}: {error.strerror} (expected to read on); fix: mend the disk and resume"
            ) from error

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()
