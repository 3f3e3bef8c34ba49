"""`blagpt bench recurrent`: all forms of an operator compute the same, and what the table says of them."""

import json
from pathlib import Path

import pytest
import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_recurrent as bench
from blagpt_pl.lab.bench import main
from blagpt_pl.lab.bench_recurrent import OPERATORS, OURS, STEPS, compare, forms_of, growths, inputs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("operator", OPERATORS)
def test_all_forms_compute_the_same(operator: str) -> None:
    given = inputs_of(operator, 37, CPU)
    forms = forms_of(operator, CPU)
    assert list(forms)[:2] == [OURS, STEPS]
    found = {}
    for name, run in forms.items():
        y, state = run(*given)
        found[name] = [y, state, *torch.autograd.grad(y.sum(), given)]
    assert len(found) >= 2
    for name, outcome in found.items():
        for mine, steps in zip(outcome, found[STEPS], strict=True):
            assert (mine - steps).abs().max() < 2e-5 * steps.abs().max(), name


def test_it_compares_with_hugging_face() -> None:
    pytest.importorskip("transformers")
    assert [name for name in forms_of("ssd", CPU) if "Hugging Face" in name] == [
        "Hugging Face, chunks of 256",
        "Hugging Face, chunks of 64",
    ]


def test_the_table_compares_within_an_operator_and_a_length() -> None:
    rows = [
        {
            "operator": "ssd",
            "form": form,
            "tokens": tokens,
            "forward_ms": ms,
            **({} if both is None else {"both_ms": both}),
        }
        for form, tokens, ms, both in (
            (OURS, 10, 2.0, 4.0),
            (STEPS, 10, 6.0, 40.0),
            (OURS, 20, 4.0, 8.0),
            (STEPS, 20, 5.0, None),
        )
    ]
    compare(rows)
    assert [row["forward_ratio"] for row in rows] == [1.0, 3.0, 1.0, 1.25]
    assert [row["both_ratio"] for row in rows] == [1.0, 10.0, 1.0, None]
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([5000, 10000 / 6, 5000, 4000])
    assert growths(rows) == ["Fit: ssd of ours, forward and backward ~ T^1.00 (2 lengths)."]


def test_it_prints_and_writes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(f"recurrent --operators dplr --lengths 8 16 --repeats 1 --warmup 0 --device cpu --out {tmp_path}".split())
    said = capsys.readouterr().out
    assert "| dplr, ours" in said and "| dplr, step by step" in said
    rows = json.loads((tmp_path / "recurrent.json").read_text())["rows"]
    assert [(row["form"], row["tokens"], "both_ms" in row) for row in rows] == [
        (OURS, 8, True),
        (STEPS, 8, True),
        (OURS, 16, True),
        (STEPS, 16, False),
    ]
    assert (tmp_path / "recurrent.svg").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--operators gru", "--operators: 'gru'"),
        ("--operators ssd ssd", "each once"),
        ("--lengths 8 8", "each once"),
        ("--lengths 0", "--lengths: 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["recurrent", "--out", str(tmp_path), *words.split()])


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, x = [], torch.ones(3, requires_grad=True)

    def run(x: torch.Tensor) -> tuple[torch.Tensor, None]:
        y = 2 * x
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append("backward"))
        seen.append(torch.is_grad_enabled())
        return y, None

    bench._forward(run, [x])
    assert seen == [False]
    bench._both(run, [x])
    assert seen == [False, True, "backward"]
    rows = [{"operator": "ssd", "form": OURS, "tokens": t, "forward_ms": t, "both_ms": t * t} for t in (10, 20)]
    assert "T^2.00" in growths(rows)[0]
    theirs, sizes = pytest.importorskip("transformers.models.mamba2.modeling_mamba2"), []
    monkeypatch.setattr(theirs, "mamba2_chunk_scan", lambda *given, **options: sizes.append(given[5]))
    for name, form in forms_of("ssd", CPU).items():
        if "Hugging" in name:
            form(*inputs_of("ssd", 5, CPU))
    assert sizes == [256, 64]
