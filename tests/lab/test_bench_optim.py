"""`blagpt bench optim`: the baseline's shapes, and a table, at a size that takes no time."""

from argparse import ArgumentParser, Namespace

import pytest
import torch
from helpers import tiny

from blagpt_pl.lab import bench_optim
from blagpt_pl.nn.roles import blocks_of, splits_of
from blagpt_pl.optim.roles import groups_by_role

CPU = torch.device("cpu")
MINI = {"d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "vocab": 64}


def test_the_full_size_is_the_baseline() -> None:
    d, n, h, g, v = bench_optim.SIZES["full"].values()
    f, kv = 4 * d, g * d // h
    matrices = n * (d * (d + 2 * kv) + d * d + 3 * d * f)
    vectors = n * (2 * d + 2 * d // h + (d + 2 * kv) + d + 2 * f + d) + d
    assert matrices + vectors + v * d == 142_570_752


def test_the_groups_are_a_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_optim.SIZES, "small", MINI)
    made = bench_optim.groups_of("small", CPU)
    model = tiny(vocab_size=64)
    theirs = groups_by_role(model.named_parameters(), model.parameter_roles(), splits_of(model), blocks_of(model))
    assert [g["role"] for g in made] == [g["role"] for g in theirs]
    assert [sum(rows) for rows in made[0]["splits"]] == [len(p) for p in made[0]["params"]]
    assert len(made[0]["params"]) == len(theirs[0]["params"])
    assert made[0]["splits"][0] == theirs[0]["splits"][0]
    assert made[0]["blocks"][:2] == theirs[0]["blocks"][:2] and len(made[0]["blocks"]) == len(theirs[0]["blocks"])
    assert [g.keys() for g in made] == [g.keys() for g in theirs]


def test_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_optim.SIZES, "small", MINI)
    parser = ArgumentParser()
    bench_optim.options(parser)
    args = Namespace(**{**vars(parser.parse_args([])), "size": "small", "repeats": 2, "warmup": 0})
    report = bench_optim.measure(args, CPU)
    rows = {row["name"]: row for row in report.rows}
    assert rows["AdamW fused"]["to_fused"] == 1
    assert rows["AdamW fused"]["ops"] < rows["AdamW foreach"]["ops"] < rows["AdamW one by one"]["ops"]
    assert rows["Muon by shape"]["ops"] < rows["Muon one by one"]["ops"] / 2
    assert round(rows["Muon by shape"]["state_bytes"], 3) == 4 and 8 <= rows["AdamW fused"]["state_bytes"] < 8.2
    assert 4 < rows["Muon and fused AdamW"]["state_bytes"] < 8
    assert rows["Adam-mini"]["state_bytes"] < 4.6 and rows["AdEMAMix"]["state_bytes"] >= 12
    assert len(rows) == 16 and all(row["median_ms"] > 0 for row in report.rows)
    assert all(len(row["times_ms"]) == 2 for row in report.rows)
    assert "Muon by shape" in report.table() and len(report.notes) == 2
