"""`blagpt bench memory`: every policy is a row with its ratios; what it refuses."""

import json
from pathlib import Path

import pytest

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench, bench_memory
from blagpt_pl.nn.memory import PARTITIONED

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "quickstart.yaml")
SMALL = ["--model.d_model", "64", "--data.context", "32", "--repeats", "1", "--warmup", "0", "--device", "cpu"]


def test_a_row_for_each_policy_and_the_first_is_the_measure(tmp_path: Path) -> None:
    policies = ["--policies", "RecomputeBlocks", "bf16 weights"]
    bench.main(["memory", CONFIG, *SMALL, "--device-batch-size", "64", "--out", str(tmp_path), *policies])
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["none", "RecomputeBlocks", "bf16 weights"]
    assert rows[0]["time_ratio"] == rows[0]["memory_ratio"] == 1
    assert rows[1]["memory_ratio"] < 0.9
    assert rows[2]["precision"] == "bf16-true"
    assert (tmp_path / "memory.svg").is_file()


def test_a_budget_without_a_compiler_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Budget has no effect") as error:
        bench.main(["memory", CONFIG, *SMALL, "--out", str(tmp_path), "--policies", "Budget 0.9"])
    assert all(name in str(error.value) for name in PARTITIONED)


def test_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--policies: 'Bugdet' "):
        bench.main(["memory", CONFIG, *SMALL, "--out", str(tmp_path), "--policies", "Bugdet"])


def test_a_configuration_with_a_policy_of_its_own_is_refused() -> None:
    tree = {"model": {"class_path": "BlaGPT", "init_args": {"memory": "RecomputeBlocks"}}}
    with pytest.raises(ConfigError, match=r"model\.memory: is set"):
        bench_memory.under(tree, None)
