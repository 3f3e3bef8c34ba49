"""`blagpt bench`: cases take turns, the table and the file say the same, mistakes are told. No time is asserted."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_compile
from blagpt_pl.lab.bench import KINDS, main, module_of
from blagpt_pl.lab.bench_attention import CORE_VALUES, WIDTHS, rows_of
from blagpt_pl.lab.bench_report import Column, Report, bars, lines, short
from blagpt_pl.lab.peak import peak_mib
from blagpt_pl.lab.timing import Case, timed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_cases_take_turns_and_the_warm_up_does_not_count() -> None:
    ran = []
    cases = [Case(name, lambda name=name: ran.append(name)) for name in "abc"]
    times = timed(cases, repeats=3, warmup=2, device=torch.device("cpu"))
    assert ran == list("abc") * 5
    assert [len(mine) for mine in times] == [3, 3, 3]


def test_a_case_may_time_itself() -> None:
    cases = [Case("clock", lambda: 7.5, itself=True), Case("work", list)]
    times = timed(cases, repeats=2, warmup=0, device=torch.device("cpu"))
    assert times[0] == [7.5, 7.5]
    assert all(0 <= t < 7.5 for t in times[1])


def test_the_ratios_are_those_of_the_medians() -> None:
    cases = [Case(name, list, tokens) for name in ("SDPA", "Other") for tokens in (16, 64)]
    rows = rows_of(cases, [[9.0, 2.0, 1.0], [8.0, 7.0, 9.0], [3.0, 3.0, 3.0], [6.0, 7.0, 1.0]])
    assert [(r["name"], r["tokens"]) for r in rows] == [("SDPA", 16), ("SDPA", 64), ("Other", 16), ("Other", 64)]
    of_rounds = [(r["median_ms"], r["fastest_ms"], r["slowest_ms"]) for r in rows]
    assert of_rounds == [(2, 1, 9), (8, 7, 9), (3, 3, 3), (6, 1, 7)]
    assert [r["to_shortest"] for r in rows] == [1, 4, 1, 2]
    assert [r["to_reference"] for r in rows] == [1, 1, 1.5, 0.75]
    assert {r["to_reference"] for r in rows_of(cases[2:], [[3.0], [6.0]])} == {None}


COLUMNS = [Column("name", ""), Column("n", "tokens", ","), Column("x", "ratio", "{:.2f} x".format)]
ROWS = [{"name": "SDPA", "n": 1024, "x": 1.0}, {"name": "Dilated", "n": 16, "x": None}]


def test_the_table_is_markdown() -> None:
    assert Report("what", COLUMNS, ROWS).table().splitlines() == [
        "|         | tokens |  ratio |",
        "| ------- | -----: | -----: |",
        "| SDPA    |  1,024 | 1.00 x |",
        "| Dilated |     16 |      - |",
    ]


@pytest.mark.parametrize(
    "draw",
    [
        lambda figure: bars(figure, ROWS, "name", [("n", "tokens"), ("x", "ratio")]),
        lambda figure: lines(
            figure, [*ROWS, {"name": "SDPA", "n": 64, "x": 2.0}], ("n", "tokens"), [("x", "ratio")], "name"
        ),
    ],
    ids=["bars", "lines"],
)
def test_a_picture_is_text_and_the_same_every_time(draw: object, tmp_path: Path) -> None:
    report = Report("what", COLUMNS, ROWS, draw=draw)
    for name in ("a.svg", "b.svg"):
        report.picture(tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert ">ratio</text>" in drawn
    assert ">SDPA</text>" in drawn
    assert "<image" not in drawn


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0.069, "0.069"),
        (7.25, "7.25"),
        (123.4, "123"),
        (1572.0, "1,572"),
        (50304, "50.3k"),
        (142.57e6, "143M"),
        (3e9, "3G"),
    ],
)
def test_labels_have_three_digits(value: float, label: str) -> None:
    assert short(value) == label


def test_the_peak_is_what_was_allocated_at_one_time() -> None:
    """Of two tensors one after the other, the larger; of compiled code, too; what was there before does not count."""
    before = torch.zeros(2**20)

    def one_after_the_other() -> None:
        for size in (2**20, 3 * 2**20):
            torch.empty(size)

    def side_by_side() -> Tensor:
        a = torch.empty(2**20)
        return a + before

    cpu = torch.device("cpu")
    assert peak_mib(one_after_the_other, cpu) == pytest.approx(12, abs=0.1)
    assert peak_mib(side_by_side, cpu) == pytest.approx(8, abs=0.1)


def test_a_run_prints_where_and_what_and_writes_it_down(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    main(f"attention --lengths 16 40 --repeats 2 --warmup 1 --device cpu --threads 1 --out {out}".split())
    printed = capsys.readouterr().out
    what, where, _, head, _, *lines = printed.splitlines()
    assert what == (
        "attention: forward and backward of one core, B 1, H 12, G 4, K 64, float32, eager; "
        "2 rounds after 1 of warm-up, cases in turn"
    )
    assert re.fullmatch(r"1 x CPU \(.+, 1 thread\), torch .+, blagpt .+, \d{4}-\d\d-\d\d \d\d:\d\d UTC", where)
    assert "median ms" in head
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [(row[0], row[1]) for row in table] == [
        ("SDPA", "16"), ("SDPA", "40"), ("Dilated", "16"), ("Dilated", "40"),
    ]  # fmt: skip
    numbers = json.loads((out / "attention.json").read_text())
    assert numbers["benchmark"] == "attention"
    assert {"what", "rounds", "hardware", "torch", "code", "date", "notes"} < set(numbers)
    for row, cells in zip(numbers["rows"], table, strict=True):
        assert len(row["times_ms"]) == 2
        assert all(t > 0 for t in row["times_ms"])
        assert cells[2] == f"{row['median_ms']:.2f}"
        assert cells[6] == f"{row['to_reference']:.2f} x"
    page = (out / "attention.md").read_text()
    assert printed.split("\n\nwritten to")[0].strip() in page
    assert "(attention.svg)" in page
    assert (out / "attention.svg").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_it_is(kind: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main([kind, "--help"])
    assert done.value.code == 0
    assert "--repeats" in capsys.readouterr().out
    module = module_of(kind)
    assert module.WHAT[0].islower()
    assert callable(module.measure)


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from blagpt_pl.lab.bench import parser; parser(); print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_loss_in_chunks_and_all_at_once(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = "--tokens 600 --vocab 3000 --width 8 --z-loss 1e-4 --softcap 15 --chunk 100 --compile eager --repeats 1 --warmup 0"
    main(["loss", *words.split(), "--device", "cpu", "--out", str(tmp_path)])
    rows = {row["name"]: row for row in json.loads((tmp_path / "loss.json").read_text())["rows"]}
    assert set(rows) == {"full", "chunked", "full, compiled", "chunked, compiled", "chunked by 100, compiled"}
    assert rows["full, compiled"]["to_base"] == rows["full, compiled"]["memory_to_base"] == 1
    assert rows["chunked by 100, compiled"]["peak_mib"] < rows["chunked"]["peak_mib"] < 0.5 * rows["full"]["peak_mib"]
    assert "softcap 15.0, z-loss 0.0001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tokens 0", "--tokens: 0"),
        ("--chunk 64 0", "--chunk: 0"),
        ("--softcap -1", "--softcap, --z-loss: .*softcap"),
    ],
)
def test_a_loss_that_cannot_be(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["loss", *words.split(), "--device", "cpu", "--out", str(tmp_path)])


SMALL = {"device": "cpu", "threads": 1, "small": True, "repeats": 1, "warmup": 0}
WORDS = ["--config", str(CONFIGS / "cpu_real_text.yaml")]


@pytest.mark.parametrize(("whole", "graphs"), [(False, 2), (True, 1)])
def test_a_first_step_says_what_was_compiled(whole: bool, graphs: int, capsys: pytest.CaptureFixture) -> None:
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    bench_compile.child(json.dumps({**SMALL, "words": WORDS, "compile": "aot_eager", "whole": whole}))
    found = json.loads(capsys.readouterr().out)
    assert found["graphs"] - before == graphs
    assert found["first_s"] > found["median_ms"] / 1e3 > 0
    torch._dynamo.reset()


def test_first_steps_are_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One of them really is; the others are told its numbers."""
    asked, run = [], bench_compile._run

    def once(request: dict, environment: dict) -> dict:
        asked.append((request["compile"], request["whole"], environment["TORCHINDUCTOR_CACHE_DIR"]))
        return run(request, environment) if len(asked) == 1 else {**once.found, "graphs": len(asked)}

    once.found = {"first_s": 2.0, "median_ms": 3.0, "times_ms": [3.0], "kernels_compiled": 4, "kernels_cached": 0}
    monkeypatch.setattr(bench_compile, "_run", once)
    main(
        [
            "compile",
            *WORDS,
            "--compile",
            "aot_eager",
            "--device",
            "cpu",
            "--repeats",
            "1",
            "--warmup",
            "0",
            "--out",
            str(tmp_path),
        ]
    )
    rows = json.loads((tmp_path / "compile.json").read_text())["rows"]
    assert [row["label"] for row in rows] == [
        "eager", "block by block cold", "block by block cached", "one graph cold", "one graph cached",
    ]  # fmt: skip
    assert [words[:2] for words in asked] == [("none", False), *2 * [("aot_eager", False)], *2 * [("aot_eager", True)]]
    assert asked[1][2] == asked[2][2] != asked[3][2] == asked[4][2]  # a cold form fills the cache of the one after it
    assert rows[0]["graphs"] == 0
    assert rows[0]["first_s"] > 0
    assert rows[1]["to_block"] == 1
    assert rows[0]["step_to_eager"] == 1


def test_a_process_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--compile: none"):
        main(["compile", *WORDS, "--compile", "none", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="bench compile: a process of it left with 1: .*KeyError"):
        bench_compile._run({"device": "cpu"}, {})


def test_a_core_can_be_compiled(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    words = ["--cores", "SDPA", "--lengths", "16", "--repeats", "1", "--device", "cpu", "--compile", "eager"]
    main(["attention", *words, "--out", str(tmp_path)])
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
        ("--out /proc/nowhere", "--out: /proc/nowhere: .* .expected a folder, or room for one"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["attention", "--out", str(tmp_path), *words.split()])


def test_a_word_that_no_option_explains_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["attention", "--config", "x.yaml"])
    assert "unrecognized arguments: --config x.yaml" in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        main(["nothing"])
    assert done.value.code == 2
    assert "attention" in capsys.readouterr().err
