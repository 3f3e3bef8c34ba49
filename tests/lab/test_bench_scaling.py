"""`blagpt bench scaling`: a step holds the same number of tokens at every length, and the exponents are those of the points."""

import argparse
from pathlib import Path

import pytest
import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_scaling

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml")
SMALL = ["--config", CONFIG, "--model.d_model", "32", "--model.n_layers", "2", "--data.context", "32"]


def measured(words: list[str], options: str) -> object:
    p = argparse.ArgumentParser()
    bench_scaling.options(p)
    args = p.parse_args(options.split())
    args.layers, args.size, args.repeats, args.warmup = words, "small", 1, 0
    return bench_scaling.measure(args, torch.device("cpu"))


def test_the_exponent_is_that_of_a_power() -> None:
    assert bench_scaling.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert bench_scaling.exponent([1, 4], [8, 2]) == pytest.approx(-1)
    assert bench_scaling.exponent([7], [3]) is None


def test_lengths_hold_as_many_tokens_and_sizes_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(bench_scaling.BATCH_TOKENS, "small", 64)
    report = measured(SMALL, "--lengths 16 32 64 --factors 1 2")
    lengths = [row for row in report.rows if row["against"] == "context"]
    sizes = [row for row in report.rows if row["against"] == "size"]
    assert [(row["size"], row["tokens"]) for row in lengths] == [("4 x 16", 64), ("2 x 32", 64), ("1 x 64", 64)]
    assert len({row["parameters"] for row in lengths}) == 1
    assert lengths[0]["flops_per_token"] < lengths[2]["flops_per_token"]
    assert [row["size"] for row in sizes] == ["2 x 32", "2 x 32"]
    assert sizes[0]["parameters"] < sizes[1]["parameters"]
    for mine in (lengths, sizes):
        assert [row["ratio"] for row in mine] == [row["us_per_token"] / mine[0]["us_per_token"] for row in mine]
    assert sum(note.startswith("Fit: ") for note in report.notes) == 4
    report.picture(tmp_path / "scaling.svg")
    assert "context, tokens" in (tmp_path / "scaling.svg").read_text()


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (SMALL, "--lengths 48 64", "--lengths: 48 .expected divisors of 64"),
        (SMALL, "--lengths 64 64", "--lengths: 64 .expected 1 or more, and each once"),
        (SMALL, "--factors 0", "--factors: 0.0 "),
        ([CONFIG, f"{CONFIG}+{Path(CONFIG).parent / 'techniques' / 'relu2.yaml'}"], "", "a second configuration"),
    ],
)
def test_mistakes_are_told(words: list[str], options: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measured(words, options)
