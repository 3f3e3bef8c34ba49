"""Token shards: the file format of llm.c and modded-nanogpt, read and written.

Source   llm.c `dev/data/data_common.py` and `llmc/dataloader.h` (Karpathy 2024); modded-nanogpt
Format   256 little-endian int32 (magic, version, token count, zeros), then the tokens, little-endian:
         magic 20240520, version 1, uint16: vocabularies up to 65,535 · magic 20240801, version 7, uint32: larger ones
Differs  a file appears under its name only when it is whole (temporary file beside it, fsync, rename), and each file is
         checked against its header; reads go through `preadv`, so a file that shrinks during training is an error
         message, where a memory map would be a SIGBUS without one
Cost     1 KiB a file; one system call a window (two where a window crosses a file edge)
"""

import bisect
import glob
import hashlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    path = Path(path)
    tokens = np.asarray(tokens).reshape(-1)
    if not 1 <= tokens.size < 2**31:
        raise DataError(
            f"data: {path}: {tokens.size} tokens (expected 1 to {2**31 - 1}); fix: split them over several shards"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise DataError(
            f"data: {path}: token ids {low} to {high} (expected 0 to {vocab_size - 1}); fix: the tokenizer's vocab_size"
        )
    magic = 20240520 if vocab_size <= 65535 else 20240801
    version, dtype = FORMATS[magic]
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, tokens.size
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(header.tobytes())
            file.write(memoryview(np.ascontiguousarray(tokens, dtype)).cast("B"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"data: {path}: {error.strerror} (expected to write {tokens.size} tokens); fix: free or change the folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return Shard.open(path)


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
        self._descriptors: dict[int, int] = {}

    @classmethod
    def open(cls, paths: Sequence[str | os.PathLike], vocab_size: int | None = None) -> "ShardSet":
        return cls([Shard.open(path) for path in paths], vocab_size)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill `out`, one row of int32 or int64, with the tokens from `start` on."""
        assert 0 <= start and start + len(out) <= self.n_tokens, (
            f"tokens {start} to {start + len(out)} of {self.n_tokens}"
        )
        number, done = bisect.bisect_right(self.starts, start) - 1, 0
        while done < len(out):
            shard = self.shards[number]
            index = start + done - self.starts[number]
            tokens = np.empty(min(len(out) - done, shard.n_tokens - index), shard.dtype)
            self._fill(number, HEADER_BYTES + index * shard.dtype.itemsize, memoryview(tokens).cast("B"))
            if self.vocab_size is not None and tokens.max() >= self.vocab_size:
                at = int(np.argmax(tokens >= self.vocab_size))
                raise DataError(
                    f"data: {shard.path}: token id {tokens[at]} at index {index + at} (expected < {self.vocab_size}, "
                    f"the tokenizer's vocabulary); fix: name the tokenizer that wrote the file in data.source, with "
                    f"model.vocab_size to match"
                )
            out[done : done + len(tokens)] = tokens
            done, number = done + len(tokens), number + 1

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
        path, got = self.shards[number].path, 0
        try:
            if number not in self._descriptors:
                self._descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while got < len(buffer):
                n = os.preadv(self._descriptors[number], [buffer[got:]], offset + got)
                if n == 0:
                    size = os.fstat(self._descriptors[number]).st_size
                    raise DataError(
                        f"data: {path}: shrank to {size} bytes since it was opened (expected {offset + len(buffer)} at "
                        f"least); fix: fetch it again and resume"
                    )
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
