"""Sources: shards by pattern, and Python's own library, made once and always the same."""

from pathlib import Path

import numpy as np
import pytest

from blagpt_pl.data import ByteTokenizer, PythonLibrary, ShardFiles, ShardSet, python_library, write_shard
from blagpt_pl.errors import ConfigError, DataError


def tokens_of(path: Path) -> list[int]:
    shards = ShardSet.open([path], vocab_size=257)
    out = np.empty(shards.n_tokens, np.int32)
    shards.read(0, out)
    return out.tolist()


def test_shard_files(tmp_path: Path) -> None:
    source = ShardFiles([f"{tmp_path}/t_*.bin"], [f"{tmp_path}/v.bin"], ByteTokenizer())  # no I/O yet
    with pytest.raises(DataError, match=r"data\.source\.init_args\.train"):
        source.train_files()
    for name in ("t_1", "t_0", "v"):
        write_shard(tmp_path / f"{name}.bin", [1], 257)
    source.fetch()
    assert [path.name for path in source.train_files()] == ["t_0.bin", "t_1.bin"]
    assert [path.name for path in source.val_files()] == ["v.bin"]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 40 small modules, and what must be left out."""
    root = tmp_path / "lib"
    for i in range(40):
        path = root / ("json" if i % 2 else "") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"x = {i}  # é\n")
    for left_out in ("site-packages/a.py", "json/tests/b.py", "test/c.py", "idlelib/d.py", "__pycache__/e.py", "f.txt"):
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_text("SECRET")
    monkeypatch.setattr(python_library.sysconfig, "get_path", lambda name: str(root))
    return root


def test_python_library(library: Path, tmp_path: Path) -> None:
    source = PythonLibrary(str(tmp_path / "out"), val_percent=30)
    source.fetch()
    (train,), (val,) = source.train_files(), source.val_files()
    documents = {path: bytes(t % 256 for t in tokens_of(path)).split(b"\0")[1:] for path in (train, val)}
    assert tokens_of(train)[0] == tokens_of(val)[0] == 256
    both = documents[train] + documents[val]
    assert sorted(both) == sorted(path.read_bytes() for path in library.rglob("m*.py"))
    assert 0 < len(documents[val]) < len(documents[train])

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (train, val)}
    source.fetch()
    assert {path: path.stat().st_mtime_ns for path in before} == {path: kept[0] for path, kept in before.items()}
    val.write_bytes(val.read_bytes()[:-1])  # damaged: made again, byte for byte
    source.fetch()
    assert {path: path.read_bytes() for path in before} == {path: kept[1] for path, kept in before.items()}


def test_another_split_is_another_file(library: Path, tmp_path: Path) -> None:
    files = [PythonLibrary(str(tmp_path), percent).val_files() for percent in (20, 30)]
    assert files[0] != files[1]
    with pytest.raises(ConfigError, match="val_percent: 0 "):
        PythonLibrary(val_percent=0)


def test_the_running_pythons_library(tmp_path: Path) -> None:
    source = PythonLibrary(str(tmp_path))
    source.fetch()
    train, val = ShardSet.open(source.train_files(), 257), ShardSet.open(source.val_files(), 257)
    assert train.n_tokens > 4_000_000 and val.n_tokens > 100_000
