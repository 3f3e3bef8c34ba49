"""What `blagpt bench overhead` reports: numbers that follow from one another, for every loop."""

import argparse
import time

import pytest
import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_overhead, null_run

CPU = torch.device("cpu")


def arguments(*words: str) -> argparse.Namespace:
    p = argparse.ArgumentParser()
    for name in ("--repeats", "--warmup"):
        p.add_argument(name, type=int)
    bench_overhead.options(p)
    return argparse.Namespace(size="small", **vars(p.parse_args(words)))


def test_a_row_for_every_loop(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(bench_overhead, "STEPS", {"small": (10, 2)})
    report = bench_overhead.measure(arguments("--repeats", "1", "--warmup", "0", "--busy-ms", "0.1"), CPU)
    assert [row["name"] for row in report.rows] == list(null_run.RUNS)
    bare, house, usual_dispatch, *_ = report.rows
    assert bare["overhead_us"] == 0 and bare["ratio"] == bare["busy_ratio"] == 1
    assert bare["calls"] < house["calls"] < usual_dispatch["calls"] / 2
    for row in report.rows:
        assert row["overhead_us"] == pytest.approx(row["median_us"] - bare["median_us"])
        assert ("busy_ratio" in row) == (row["name"] in bench_overhead.BUSY)
    assert "bare loop" in report.table()
    report.picture(tmp_path / "overhead.svg")
    assert "Python calls a step" in (tmp_path / "overhead.svg").read_text()


def test_a_busy_step_uses_the_time_it_says() -> None:
    start = time.process_time()
    beside = null_run.cpu_ms(null_run.bare, CPU, 50, busy_ms=3.0)
    used = 1e3 * (time.process_time() - start)
    assert used >= 50 * 3.0  # and it is taken out of the measurement:
    assert 0 < beside < used / 50 - 3.0 + 1.0


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_a_busy_step_takes_some_time(value: str) -> None:
    with pytest.raises(ConfigError, match="--busy-ms"):
        bench_overhead.measure(arguments("--busy-ms", value), CPU)
