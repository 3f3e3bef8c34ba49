"""`blagpt bench`: cases take turns, the table and the file say the same, mistakes are told. No time is asserted."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench import main
from blagpt_pl.lab.bench_attention import CORE_VALUES, WIDTHS
from blagpt_pl.lab.timing import Case, rows_of, table, timed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_cases_take_turns_and_the_warm_up_does_not_count() -> None:
    ran = []
    cases = [Case(name, 8, lambda name=name: ran.append(name)) for name in "abc"]
    times = timed(cases, repeats=3, warmup=2, device=torch.device("cpu"))
    assert ran == list("abc") * 5
    assert [len(mine) for mine in times] == [3, 3, 3]


def test_the_ratios_are_those_of_the_medians() -> None:
    cases = [Case(name, tokens, list) for name in ("SDPA", "Other") for tokens in (16, 64)]
    rows = rows_of(cases, [[9.0, 2.0, 1.0], [8.0, 7.0, 9.0], [3.0, 3.0, 3.0], [6.0, 7.0, 1.0]])
    assert [(r.name, r.tokens) for r in rows] == [("SDPA", 16), ("SDPA", 64), ("Other", 16), ("Other", 64)]
    assert [(r.median_ms, r.fastest_ms, r.slowest_ms) for r in rows] == [(2, 1, 9), (8, 7, 9), (3, 3, 3), (6, 1, 7)]
    assert [r.to_shortest for r in rows] == [1, 4, 1, 2]
    assert [r.to_reference for r in rows] == [1, 1, 1.5, 0.75]
    assert {r.to_reference for r in rows_of(cases[2:], [[3.0], [6.0]])} == {None}


def test_the_table_is_markdown() -> None:
    rows = rows_of([Case("SDPA", 16, list), Case("Dilated", 16, list)], [[2.0], [3.0]])
    assert table(rows).splitlines() == [
        "|         | tokens | median ms | fastest | slowest | to shortest | to SDPA |",
        "| ------- | -----: | --------: | ------: | ------: | ----------: | ------: |",
        "| SDPA    |     16 |      2.00 |    2.00 |    2.00 |      1.00 x |  1.00 x |",
        "| Dilated |     16 |      3.00 |    3.00 |    3.00 |      1.00 x |  1.50 x |",
    ]
    assert table(rows_of([Case("Dilated", 16, list)], [[3.0]])).endswith("|       - |")


def test_a_run_prints_where_and_what_and_writes_it_down(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    words = f"attention --lengths 16 40 --repeats 2 --warmup 1 --device cpu --threads 1 --json {path}"
    main(words.split())
    what, where, _, head, _, *lines = capsys.readouterr().out.splitlines()
    assert what == (
        "attention: forward and backward of one core, B 1, H 12, G 4, K 64, float32, eager; "
        "2 rounds after 1 of warm-up, cases in turn"
    )
    assert re.fullmatch(r"1 x CPU \(.+, 1 thread\), torch .+, blagpt .+, \d{4}-\d\d-\d\d \d\d:\d\d UTC", where)
    assert "median ms" in head
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[1]) for row in printed] == [
        ("SDPA", "16"), ("SDPA", "40"), ("Dilated", "16"), ("Dilated", "40"),
    ]  # fmt: skip
    numbers = json.loads(path.read_text())
    assert numbers["benchmark"] == "attention"
    assert {"what", "rounds", "hardware", "torch", "code", "date"} < set(numbers)
    for row, cells in zip(numbers["rows"], printed, strict=True):
        assert len(row["times_ms"]) == 2
        assert all(t > 0 for t in row["times_ms"])
        assert cells[2] == f"{row['median_ms']:.2f}"
        assert cells[6] == f"{row['to_reference']:.2f} x"


def test_a_core_can_be_compiled(capsys: pytest.CaptureFixture) -> None:
    words = ["--cores", "SDPA", "--lengths", "16", "--repeats", "1", "--device", "cpu", "--compile", "eager"]
    main(["attention", *words])
    assert "compiled by eager" in capsys.readouterr().out


def test_what_is_timed_is_the_baseline_and_the_overlay() -> None:
    heads = yaml.safe_load((CONFIGS / "blagpt.yaml").read_text())["model"]["init_args"]
    attention = heads["block"]["init_args"]["attention"]["init_args"]
    ours = {"B": 1, "H": attention["n_heads"], "G": attention["n_kv_heads"]}
    assert {**ours, "K": heads["d_model"] // attention["n_heads"]} == WIDTHS
    overlay = yaml.safe_load((CONFIGS / "techniques" / "dilated.yaml").read_text())
    assert overlay["model.block.attention.core"] == {"class_path": "Dilated", "init_args": CORE_VALUES["Dilated"]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cores Nothing", "--cores: 'Nothing' is not a core .*Dilated.*SDPA"),
        ("--cores RMSNorm", "--cores: 'RMSNorm' is not a core"),
        ("--cores SDPA SDPA", "--cores: SDPA SDPA .expected each once"),
        ("--lengths 16 0", "--lengths: 0 .expected 1 or more"),
        ("--repeats 0", "--repeats: 0"),
        ("--warmup -1", "--warmup: -1"),
        ("--threads 0", "--threads: 0"),
        ("--device nowhere", "--device: 'nowhere' cannot be used"),
        ("--compile nothing", "--compile: 'nothing' is no backend"),
        ("--json /nowhere/at/all.json", "--json: /nowhere/at/all.json .expected a file in a folder that exists"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["attention", *words.split()])


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main(["nothing"])
    assert done.value.code == 2
    assert "attention" in capsys.readouterr().err
