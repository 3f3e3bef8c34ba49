"""`blagpt bench loader`: every row reads what it says, the shard is removed, mistakes are told. No time is asserted."""

import json
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from blagpt_pl.data import write_shard
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_loader
from blagpt_pl.lab.bench import main


def test_every_row_reads_the_windows_it_says(tmp_path: Path) -> None:
    tokens = np.arange(1001) % 50257
    shard = write_shard(tmp_path / "t.bin", tokens, bench_loader.VOCABULARY)
    threads = threading.active_count()
    with ExitStack() as stack:
        read = {
            r.name: [r.read() for _ in range(3)]
            for r in bench_loader.readers_of(shard, 4, 10, torch.device("cpu"), stack)
        }
    patience = time.monotonic() + 10  # a queue's thread may take a moment to end
    while threading.active_count() > threads and time.monotonic() < patience:
        time.sleep(0.05)
    assert threading.active_count() <= threads
    naive = [np.stack([tokens[10 * w : 10 * w + 11] for w in range(4 * step, 4 * step + 4)]) for step in range(3)]
    shuffled = [batches for name, batches in read.items() if "shuffled" in name]
    assert all(torch.equal(a, b) for a, b in zip(*shuffled, strict=True))
    assert all((batch.diff() == 1).all() and (batch[..., 0] % 10 == 0).all() for batch in shuffled[0])
    for name in set(read) - {n for n in read if "shuffled" in n}:
        for got, wanted in zip(read[name], naive, strict=True):
            if name == "memory map, one slice":
                assert np.array_equal(got, np.unique(wanted)) and got.dtype == np.int32, name
            elif name.endswith("inputs and targets"):
                inputs, targets = got
                assert np.array_equal(inputs, wanted[:, :-1]) and np.array_equal(targets, wanted[:, 1:]), name
            else:
                assert np.array_equal(got.reshape(4, 11), wanted), name
    assert len(read) == 9


def test_a_run_writes_every_time_down_and_leaves_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(bench_loader.TOKENS, "small", 5000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    words = "loader --device-batch-size 4 --context 16 --repeats 2 --warmup 0 --device cpu --out"
    main([*words.split(), str(tmp_path)])
    written = json.loads((tmp_path / "loader.json").read_text())
    assert len(written["rows"]) == 9
    reference = next(row for row in written["rows"] if row["name"] == bench_loader.REFERENCE)
    for row in written["rows"]:
        assert len(row["times_ms"]) == 2 and row["batch"] == 4 and row["context"] == 16
        assert row["median_us"] == pytest.approx(1e3 * row["median_ms"])
        assert row["m_tokens_per_s"] == pytest.approx(4 * 16 / row["median_us"])
        assert row["ratio"] == pytest.approx(row["median_ms"] / reference["median_ms"])
    assert "Demand: 0.43 to 0.87 M tokens/s" in capsys.readouterr().out
    assert (tmp_path / "loader.svg").is_file()
    assert not list((tmp_path / "temporary").iterdir())


def test_what_is_read_ahead_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reads = [0.0], []

    def read() -> None:
        reads.append(None)
        clock[0] += 5.0 if len(reads) <= 3 else 0.25

    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench_loader.time, "sleep", lambda _: None)
    assert bench_loader.Reader("x", read, ahead=3).burst() == pytest.approx(250.0)
    assert len(reads) == 3 + bench_loader.BURST


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--context 0", r"--context: 0 \(expected 1 or more\)"),
        ("--device-batch-size -1", r"--device-batch-size: -1 \(expected 1 or more\)"),
        (
            "--context 200000",
            r"--device-batch-size 64 x --context 200000: 12800000 tokens \(expected < 10000000, --size small",
        ),
    ],
)
def test_mistakes_are_told(words: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        main(["loader", *words.split(), "--device", "cpu", "--out", str(tmp_path)])
