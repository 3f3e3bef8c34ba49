"""Shards: written and read back, damaged files refused by name, reads that cross files and files that shrink."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.data import Shard, ShardSet, find_files, write_pieces, write_shard
from blagpt_pl.errors import DataError

REAL = Path(__file__).resolve().parents[2].parent / "shared/data/shards"


def header(magic: int, version: int, n_tokens: int) -> bytes:
    return np.array([magic, version, n_tokens] + [0] * 253, "<i4").tobytes()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([257, 50257, 65535, 65536, 128256, 2**31]))
def test_round_trip_over_several_files(data: st.DataObject, vocab_size: int) -> None:
    ids = st.integers(0, vocab_size - 1)
    parts = data.draw(st.lists(st.lists(ids, min_size=1, max_size=40), min_size=1, max_size=4))
    whole = [token for part in parts for token in part]
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        shards = [write_shard(f"{folder}/{i}.bin", part, vocab_size) for i, part in enumerate(parts)]
        assert [shard.dtype.itemsize for shard in shards] == [2 if vocab_size <= 65535 else 4] * len(parts)
        shard_set = ShardSet.open([shard.path for shard in shards], vocab_size)
        out = np.empty(stop - start, np.int32 if vocab_size < 2**31 else np.int64)
        shard_set.read(start, out)
        assert shard_set.n_tokens == len(whole)
        assert out.tolist() == whole[start:stop]
        assert sorted(os.listdir(folder)) == [f"{i}.bin" for i in range(len(parts))]


def test_bytes_are_those_of_llm_c(tmp_path: Path) -> None:
    small, large = (
        write_shard(tmp_path / "a.bin", [1, 2, 50256], 50257),
        write_shard(tmp_path / "b.bin", [1, 70000], 70001),
    )
    assert small.path.read_bytes() == header(20240520, 1, 3) + np.array([1, 2, 50256], "<u2").tobytes()
    assert large.path.read_bytes() == header(20240801, 7, 2) + np.array([1, 70000], "<u4").tobytes()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes (expected 1024 of header at least): partial download"),
        (b"x" * 500, "500 bytes (expected 1024 of header at least)"),
        (header(7, 1, 10) + bytes(20), "magic 7 (expected 20240520 or 20240801)"),
        (header(20240520, 2, 10) + bytes(20), "version 2 (expected 1)"),
        (header(20240801, 1, 10) + bytes(40), "version 1 (expected 7)"),
        (header(20240520, 1, 0), "0 tokens in the header"),
        (header(20240520, 1, -5), "-5 tokens in the header"),
        (header(20240520, 1, 2000) + bytes(2000), "3024 bytes (expected 5024 for 2000 tokens): partial download"),
        (header(20240520, 1, 2000) + bytes(3999), "5023 bytes (expected 5024 for 2000 tokens): partial download"),
        (header(20240520, 1, 2000) + bytes(4001), "5025 bytes (expected 5024 for 2000 tokens): bytes that the header"),
        (None, "No such file or directory (expected a token shard)"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "bad.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        Shard.open(path)
    message = str(error.value)
    assert "bad.bin" in message and says in message and "fix: " in message and "\n" not in message


def test_pieces_are_the_file_that_they_are_together(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 257, 1000)
    whole = write_shard(tmp_path / "whole.bin", tokens, 257)
    pieces = np.split(tokens, [0, 1, 400, 400, 999])
    joined = write_pieces(tmp_path / "joined.bin", (piece for piece in pieces), 257)
    assert joined.path.read_bytes() == whole.path.read_bytes()
    assert joined.n_tokens == 1000


def test_pieces_that_fail_leave_the_old_file(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.bin", [1, 2], 257).path
    before = path.read_bytes()

    def stops() -> Iterator[np.ndarray]:
        yield np.arange(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pieces(path, stops(), 257)
    with pytest.raises(DataError, match=r"a\.bin: token ids 0 to 257 \(expected 0 to 256\)"):
        write_pieces(path, [np.arange(5), np.arange(258)], 257)
    with pytest.raises(DataError, match=r"a\.bin: 0 tokens"):
        write_pieces(path, [np.arange(0)], 257)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert path.read_bytes() == before


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    for tokens in ([], [-1], [257]):
        with pytest.raises(DataError, match=r"a\.bin"):
            write_shard(path, tokens, 257)
    write_shard(path, [1, 2], 257)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(DataError, match="No space left on device"):
        write_shard(path, [3, 4, 5], 257)
    assert os.listdir(tmp_path) == ["a.bin"]
    assert Shard.open(path).n_tokens == 2  # the earlier file is whole


def test_an_id_beyond_the_vocabulary_is_named(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "first.bin", range(10), 50304)
    second = write_shard(tmp_path / "second.bin", [*range(17), 50300, 50303], 50304)
    shards = ShardSet([first, second], vocab_size=50257)
    shards.read(0, np.empty(27, np.int32))
    with pytest.raises(DataError, match=r"second\.bin: token id 50300 at index 17 .*50257.*model\.vocab_size"):
        shards.read(5, np.empty(24, np.int32))
    huge = ShardSet([write_shard(tmp_path / "huge.bin", [2**31 + 5], 2**32)], vocab_size=50257)
    with pytest.raises(DataError, match=f"token id {2**31 + 5} at index 0"):  # it would be negative as int32
        huge.read(0, np.empty(1, np.int32))


def test_a_file_that_shrinks_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    shards = ShardSet([write_shard(tmp_path / "s.bin", range(4000), 50257)])
    shards.read(0, np.empty(10, np.int32))
    os.truncate(tmp_path / "s.bin", 5120)
    with pytest.raises(DataError, match=r"s\.bin: shrank to 5120 bytes"):
        shards.read(3000, np.empty(10, np.int32))


def test_fingerprint_knows_names_order_counts_and_contents(tmp_path: Path) -> None:
    def fingerprint(*files: tuple[str, list[int]], folder: str = "x") -> str:
        return ShardSet([write_shard(tmp_path / folder / name, tokens, 257) for name, tokens in files]).fingerprint()

    a, b = ("a.bin", [1, 2, 3]), ("b.bin", [4, 5])
    base = fingerprint(a, b)
    assert base == fingerprint(a, b) == fingerprint(a, b, folder="moved")
    others = [fingerprint(b, a), fingerprint(a), fingerprint(("c.bin", a[1]), b), fingerprint(("a.bin", [1, 2, 9]), b)]
    assert len({base, *others}) == 5
    page = list(range(256)) * 8  # 4 KiB
    end, last = [*page * 40, 7], [*page * 40, 8]  # beyond 64 KiB it samples, and its samples hold the last page
    assert fingerprint(("a.bin", end)) != fingerprint(("a.bin", last))


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b_2.bin", "b_1.bin", "a_3.bin"):
        write_shard(name, [1], 257)
    assert [path.name for path in find_files(["b_*.bin", "a_*.bin"], "data.x")] == ["b_1.bin", "b_2.bin", "a_3.bin"]
    with pytest.raises(DataError, match=r"no file matches 'c_\*\.bin' \(cwd .*\); fix: correct data\.x"):
        find_files(["b_*.bin", "c_*.bin"], "data.x")
    with pytest.raises(DataError, match=r"b_1\.bin matches two patterns of data\.x"):
        find_files(["b_*.bin", "*_1.bin"], "data.x")
    with pytest.raises(DataError, match=r"data\.x is empty"):
        find_files([], "data.x")


def test_descriptors_are_opened_late_and_given_back(tmp_path: Path) -> None:
    shards = ShardSet([write_shard(tmp_path / f"{i}.bin", [i, i], 257) for i in range(3)])
    before = len(os.listdir("/dev/fd"))
    shards.read(3, np.empty(3, np.int32))  # files 1 and 2
    assert len(os.listdir("/dev/fd")) == before + 2
    del shards
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared shards are not on this machine")
def test_real_shards() -> None:
    shards = ShardSet.open(find_files([f"{REAL}/webtext_train_*.bin"], "data.x"), vocab_size=50257)
    assert shards.n_tokens == 13_597_518
    edge = np.empty(40, np.int32)
    shards.read(3_998_855 - 20, edge)
    naive = [np.fromfile(REAL / f"webtext_train_00000{i}.bin", "<u2")[512:] for i in (1, 2)]
    assert edge.tolist() == [*naive[0][-20:], *naive[1][:20]]
    assert edge[20] == 50256
