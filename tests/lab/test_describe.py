"""`blagpt describe`: an account is what the parts of it say, is shown whole, and never has a silent zero."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import T, V, tiny
from torch import nn

from blagpt_pl.devices import device_named
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import describe, schedule_plot
from blagpt_pl.lab.account import Account, ranks_of
from blagpt_pl.lab.describe_table import beside, difference, shown, single
from blagpt_pl.lab.leading_files import leading_files
from blagpt_pl.lab.model_of import layers_for
from blagpt_pl.lab.module_table import Table, sizes
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASELINE, QUICKSTART = str(CONFIGS / "blagpt.yaml"), str(CONFIGS / "quickstart.yaml")
SMALL = replace(device_named("H200"), memory_bytes=2 * 10**9)  # soon full


def account(*words: str) -> Account:
    return Account(layers_for(words), SMALL)


def facts(of: Account) -> dict[str, float | None]:
    return {f"{f.section}: {f.name}": f.value for f in of.facts()}


@pytest.fixture(scope="module")
def quickstart() -> Account:
    return account("--config", QUICKSTART)


# ---------------------------------------------------------------------- the numbers


def test_the_numbers_of_a_run(quickstart: Account) -> None:
    found = facts(quickstart)
    n = 820_736
    assert (found["parameters: total"], found["parameters: active"]) == (n, n)
    assert found["parameters: embedding"] == 257 * 128
    flops = (
        6 * (n - 4 * (2 * 128 + 2 * 32) - 128) + 4 * 3 * 256 * 4 * 64
    )  # gains do not multiply; 4 layers of attention
    assert found["FLOPs a token: total"] == flops == 3 * found["FLOPs a token: forward"]
    assert found["run: tokens"] == 400 * 16 * 256
    assert found["run: FLOPs"] == flops * 400 * 16 * 256
    assert found["memory of a step: weights"] == 4 * n
    assert 8 * n <= found["memory of a step: optimizer"] < 8 * n + 1000
    parts = [v for k, v in found.items() if k.startswith("memory of a step: ") and not k.endswith("total")]
    assert sum(parts) == found["memory of a step: total"]
    assert found["on H200: step"] is None  # float32 is not predicted


def test_an_untied_head_leaves_the_table_to_be_looked_up() -> None:
    tied, untied = tiny(), tiny(head=LinearHead)
    d = tied.embedding.weight.shape[1]
    assert sizes(tied, tied.head)["active"] == sum(p.numel() for p in tied.parameters())
    n = sizes(untied, untied.head)
    assert n["total"] - n["active"] == (V - 1) * d and n["embedding"] == V * d


def test_rows_add_up_and_those_alike_are_one() -> None:
    model = tiny(n_layers=3)
    counted = count_flops(model, T)
    table = Table(model, counted.forward, counted.backward)
    top = table.rows(1)
    assert sum(row.parameters for row in top) == sum(p.numel() for p in model.parameters())
    for of, whole in (("forward", counted.forward), ("backward", counted.backward)):
        assert sum(getattr(row, of) for row in top) == sum(whole.values())
    assert [(row.path, row.kind) for row in top] == [
        ("embedding", "Embedding"),
        ("blocks.*", "3 × Block"),
        ("norm", "RMSNorm"),
        ("head", "TiedHead"),
    ]
    assert top[-1].tied and not top[-1].parameters
    deep = {row.path: row for row in table.rows(4)}
    assert deep["blocks.*.mlp.part.gate_up"].parameters == 3 * model.blocks[0].mlp.part.gate_up.weight.numel()
    assert deep["blocks.*.mlp"].forward == sum(
        row.forward for path, row in deep.items() if path.startswith("blocks.*.mlp.part.")
    )


def test_layers_that_differ_are_rows_of_their_own() -> None:
    model = tiny(n_layers=3)
    model.blocks[1].mlp.part.down.bias = nn.Parameter(torch.zeros(32))
    assert [row.path for row in Table(model, {}, {}).rows(1)][1:4] == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize(
    ("trainer", "ranks"),
    [
        ({}, 1),
        ({"devices": "auto"}, 1),
        ({"devices": 8}, 8),
        ({"devices": [0, 1], "num_nodes": 2}, 4),
        ({"devices": "4"}, 4),
    ],
)
def test_the_ranks_of_a_trainer(trainer: dict, ranks: int) -> None:
    assert ranks_of(trainer) == ranks


def test_sizes_that_do_not_divide_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"data\.batch_size: 16 does not divide into data\.device_batch_size=16 on 3 ranks"
    ):
        list(account("--config", QUICKSTART, "--trainer.devices", "3").facts())


def test_the_largest_batch_fits_and_divides(quickstart: Account) -> None:
    small = account("--config", QUICKSTART, "--data.batch_size", "24", "--data.device_batch_size", "4")
    small.device = replace(SMALL, memory_bytes=int(small.memory.at(9)["total"] / 0.94) + 1)
    assert (small.largest_batch, small.largest_that_divides) == (9, 8)


# ---------------------------------------------------------------------- what it cannot count

UNCOUNTED = '''
"""A mixer whose scan is an operation that nobody knows."""

import torch
from torch import Tensor

from blagpt_pl.nn.base import Carry, OutputLinear, SequenceMixer, Site


@torch.library.custom_op("describe_test::scan", mutates_args=())
def scan(x: Tensor) -> Tensor:
    return x.cumsum(1)


@scan.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


scan.register_autograd(lambda ctx, grad: grad.flip(1).cumsum(1).flip(1))


class Scan(SequenceMixer):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = OutputLinear(site.d_model, site.d_model)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.out(scan(x))


class Looks(Scan):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.out(x) if x.sum().item() > 0 else self.out(2 * x)
'''


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "uncounted_ideas.py").write_text(UNCOUNTED)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("strangers")
def test_an_operation_that_is_not_known_is_listed_and_the_total_a_lower_bound() -> None:
    of = account("--config", QUICKSTART, "--model.block.attention", "uncounted_ideas.Scan")
    found = {f.name: f for f in of.facts() if f.section == "FLOPs a token"}
    assert found["not counted: describe_test::scan"].value == 4
    assert all(found[name].note == "lower bound" for name in ("forward", "backward", "total"))
    assert [f.note for f in of.facts() if f.name == "FLOPs"] == ["lower bound; training alone"]
    text = "\n".join(single(of, 2))
    assert "lower bound" in text and "describe_test::scan" in text and "4 times" in text


@pytest.mark.usefixtures("strangers")
def test_a_model_that_needs_data_is_told_and_never_zero() -> None:
    of = account("--config", QUICKSTART, "--model.block.attention", "uncounted_ideas.Looks")
    total = next(f for f in of.facts() if f.section == "FLOPs a token")
    assert total.value is None and "blocks.0.attention.part" in total.note and "_local_scalar_dense" in total.note
    assert "on H200: step" in facts(of) and facts(of)["on H200: step"] is None


def test_an_optimizer_that_cannot_be_followed_makes_a_lower_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    of = account("--config", QUICKSTART)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: self.state["x"].item())
    text = "\n".join(single(of, 1))
    assert "lower bound: " in text and "AdamW does not run without data" in text


# ---------------------------------------------------------------------- how it is shown


def test_the_page_of_the_baseline(capsys: pytest.CaptureFixture) -> None:
    describe.main(["--config", BASELINE, "--gpu", "h100", "--trainer.devices", "8"])
    text = capsys.readouterr().out
    rows = {line.strip().partition("  ")[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert text.startswith("BlaGPT, 1024 tokens of context, 32 sequences a forward, 8 ranks, bf16-mixed, compiled\n")
    assert rows["blocks.*"][-3:] == ["103,936,512", "226,492,416", "452,984,832"]
    assert rows["head"][-3:] == ["tied", "77,266,944", "154,533,888"]
    assert "142,570,752" in text and "911,278,080" in text and "2,673,868,800" in text and "2.437e+18" in text
    assert "on H100, 8 of them" in text and "no run of ours has confirmed it" in text


def test_two_beside_each_other(capsys: pytest.CaptureFixture) -> None:
    wide = f"{QUICKSTART}+{CONFIGS / 'techniques' / 'untied.yaml'}"
    describe.main([QUICKSTART, wide, "--gpu", "4090"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("quickstart: BlaGPT") and lines[1].startswith("quickstart+untied: BlaGPT")
    assert lines[3].split() == ["quickstart", "quickstart+untied", "difference"]
    total = next(line for line in lines if line.startswith("  total"))
    assert total.split() == ["total", "820,736", "853,632", "+32,896", "+4.0%"]
    steps = next(line for line in lines if line.startswith("  steps"))
    assert steps.split() == ["steps", "400", "400", "="]
    assert [line.partition(":")[0] for line in lines[-2:]] == ["quickstart", "quickstart+untied"]
    assert all(": learning rate 0.005, Trapezoid (" in line for line in lines[-2:])


def test_three_have_no_difference(quickstart: Account) -> None:
    lines = list(beside(dict.fromkeys("abc", quickstart)))
    assert lines[4].split() == ["a", "b", "c"]
    assert not any("%" in line and "MFU" not in line for line in lines)


def test_as_json(capsys: pytest.CaptureFixture) -> None:
    describe.main(["--config", QUICKSTART, "--json", "--depth", "1", "--gpu", "4090"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["facts"]["parameters"]["total"]["value"] == 820_736
    assert [row["path"] for row in found["modules"]] == ["embedding", "blocks.*", "norm", "head"]
    assert found["schedule"]["class"] == "Trapezoid" and len(found["schedule"]["factors"]) == 61
    assert found["uncounted"] == {} and found["flops_are_of_tokens"] == 256
    assert (
        sum(r["forward"] + r["backward"] for r in found["modules"])
        == 256 * found["facts"]["FLOPs a token"]["total"]["value"]
    )


def test_the_schedule_is_a_picture(capsys: pytest.CaptureFixture) -> None:
    muon = ["--config", str(CONFIGS / "optim" / "muon.yaml")]
    lengths = ["--model.schedule.warmup", "0.5", "--model.schedule.warmdown", "100"]
    describe.main(["--config", QUICKSTART, *muon, *lengths, "--depth", "1", "--gpu", "4090"])
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("learning rate, Trapezoid (warmup 0.5 = 200 steps, warmdown 100)")
    top, *others, low, axis, steps, peaks = lines[at + 1 :]
    assert top.split("|")[0].strip() == "peak" and axis.split("+")[0].strip() == "0" and len(others) == 4
    bars = low.split("|")[1]
    assert "█" not in bars[:3] and set(bars[12:50]) == {"█"} and len(bars) == 60
    assert top.split("|")[1].startswith(" " * 24) and "█" * 14 in top
    assert steps.split() == ["step", "0", "step", "399"]
    assert peaks.split(maxsplit=1) == ["peak", "matrix 0.02; embedding, vector 0.001"]


def test_the_schedule_as_data_and_in_a_line(quickstart: Account) -> None:
    rates = schedule_plot.rates_of(quickstart)
    found = schedule_plot.data(rates)
    assert (found["class"], found["options"], found["total_steps"]) == (
        "Trapezoid",
        {"warmup": 20, "warmdown": 160},
        400,
    )
    assert found["peaks"] == [{"role": role, "lr": 0.005} for role in ("matrix", "embedding", "vector")]
    assert (len(found["steps"]), found["steps"][0], found["steps"][-1]) == (61, 0, 399)
    assert found["factors"] == [quickstart.model.schedule_factory(400).factor(step) for step in found["steps"]]
    assert schedule_plot.line("a", rates).startswith("a: learning rate 0.005, Trapezoid (warmup 20, warmdown 160)  ▁█")


def test_the_schedule_of_a_run_without_an_end_is_not_known() -> None:
    rates = schedule_plot.rates_of(account("--config", QUICKSTART, "--trainer.max_steps", "-1"))
    assert schedule_plot.plot(rates)[-1].split()[:2] == ["schedule", "-"]
    assert schedule_plot.line("a", rates).endswith("-") and schedule_plot.data(rates)["factors"] == []


def test_a_schedule_that_does_not_fit_is_told_with_its_place() -> None:
    of = account("--config", QUICKSTART, "--trainer.max_steps", "100")
    with pytest.raises(ConfigError, match=r"warmup=20 and warmdown=160 do not fit .*quickstart\.yaml:\d+\)$"):
        schedule_plot.rates_of(of)


def test_bars() -> None:
    assert schedule_plot.picture([0, 1e-9, 0.25, 0.5, 1], 2) == ["    █", " ▁▄██"]
    assert schedule_plot.picture([1, 2], 1) == ["▄█"], "a factor above 1 is not cut"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "", "-"),
        (1234567, "", "1,234,567"),
        (3 * 2**20, "bytes", "3 MiB"),
        (512, "bytes", "0.5 KiB"),
        (0, "bytes", "0 MiB"),
        (12.34, "ms", "12.3 ms"),
        (0.4567, "share", "45.7%"),
        (2.4e18, "FLOP", "2.4e+18"),
        (911_278_080, "FLOP", "911,278,080"),
    ],
)
def test_a_number_as_a_person_reads_it(value: float | None, unit: str, text: str) -> None:
    assert shown(value, unit) == text


def test_a_difference() -> None:
    assert difference([1.0, 2.0], "ms").split() == ["+1.0", "ms", "+100.0%"]
    assert difference([0, 5], "").split() == ["+5"]
    assert difference([3, 3], "").split() == ["="]
    assert difference([None, 3], "") == difference([1, 2, 3], "") == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H300"], "--gpu: 'H300' .*fix: H[12]00"),
        (["--depth", "0"], "--depth: 0 "),
        (["--model.d_modl", "3"], "model.d_modl: BlaGPT has no such option"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe.main(["--config", QUICKSTART, *words])


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        describe.main(["nowhere.yaml"])


def test_the_command_itself_allocates_nothing() -> None:
    """A model of 1.6 billion parameters, 24 GiB with its optimizer, in a process that may not have 6."""
    wide = [
        "--model.d_model",
        "4096",
        "--model.n_layers",
        "12",
        "--model.block.attention.n_heads",
        "32",
        "--gpu",
        "B200",
    ]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30)); "
    code = f"{limit}import sys; sys.argv[1:] = {['describe', '--config', BASELINE, *wide]!r}; from blagpt_pl.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert int(done.stdout.split("\nparameters\n")[1].split()[1].replace(",", "")) > 1.5e9


# ---------------------------------------------------------------------- what mutations survived


@pytest.fixture(scope="module")
def eight() -> Account:
    return Account(layers_for(["--config", BASELINE, "--trainer.devices", "8"]), device_named("H200"))


def test_the_time_of_eight_ranks_by_hand(eight: Account) -> None:
    n, flops, attention, share = 142_570_752, 911_278_080, 3 * 12 * 1024 * 12 * (64 + 64), 512 * 1024 / 8
    kept = eight.memory.peaks(32).kept
    assert (eight.micro_batches, eight.attention_flops) == (2, attention)
    assert kept["activations"] / (32 * 1024 * 12) < 40_000  # compiled
    moved = share * (3 * kept["activations"] / (32 * 1024) + 12 * 50304) + n * (24 * 2 + 12) + 2 * kept["optimizer"]
    seconds = share * (flops - attention) / (0.632 * 989.4e12) + share * attention / (0.26 * 989.4e12)
    seconds += moved / (0.9 * 4.8e12) + 2.1e-11 * 4 * n
    found = facts(eight)
    assert found["on H200: step"] == pytest.approx(1e3 * seconds)
    assert found["on H200: run"] == pytest.approx(5100 * seconds / 3600)
    assert found["on H200: MFU"] == pytest.approx(512 * 1024 / seconds * flops / (8 * 989.4e12))
    assert found["run: tokens a step"] == 524_288


def test_a_second_micro_batch_finds_gradients_and_ranks_share_the_batch() -> None:
    of = account(
        "--config", QUICKSTART, "--data.batch_size", "24", "--data.device_batch_size", "4", "--trainer.devices", "2"
    )
    assert of.micro_batches == 3
    assert facts(of)["memory of a step: gradients"] == 4 * 820_736
    tight = Account(of.layers, replace(SMALL, memory_bytes=int(of.memory.at(9)["total"] / 0.94) + 1))
    assert (tight.largest_batch, tight.largest_that_divides) == (9, 6)


def test_a_batch_that_must_be_cut_is_counted_with_the_gradients_of_the_first_cut(quickstart: Account) -> None:
    """device_batch_size is the whole batch; where that does not fit, what fits is one of several micro-batches."""
    of = account("--config", QUICKSTART)
    need = [of.memory.at(8, micro)["total"] for micro in (1, 2)]
    of.device = replace(SMALL, memory_bytes=int(sum(need) / 2 / 0.94) + 1)
    assert of.memory.at(of.largest_batch, 2)["total"] <= 0.94 * of.device.memory_bytes


def test_tokens_a_parameter_are_of_all_parameters() -> None:
    untied = account("--config", QUICKSTART, "--config", str(CONFIGS / "techniques" / "untied.yaml"))
    assert facts(untied)["run: tokens a parameter"] == 400 * 16 * 256 / 853_632


def test_layers_of_other_flops_are_rows_of_their_own() -> None:
    counted = {f"blocks.{i}": 10 + (i == 1) for i in range(3)}
    assert [row.path for row in Table(tiny(n_layers=3), counted, {}).rows(1)][1:4] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]


def test_what_is_not_known_is_noted_below_the_columns(quickstart: Account) -> None:
    assert any(
        line.startswith("step: not predicted: trainer.precision") for line in beside({"a": quickstart, "b": quickstart})
    )


def test_a_plus_in_the_name_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a+b.yaml").touch()
    assert leading_files([f"{tmp_path}/a+b.yaml"])[0][0][1] == ["--config", f"{tmp_path}/a+b.yaml"]


@pytest.mark.parametrize("steps", ["-1"])
def test_no_number_of_steps_is_told_and_never_zero(steps: str) -> None:
    found = facts(account("--config", QUICKSTART, "--trainer.max_steps", steps))
    assert found["run: steps"] is None and "run: tokens" not in found


def test_no_sequence_at_all_is_told() -> None:
    with pytest.raises(ConfigError, match=r"data\.device_batch_size: 0"):
        list(account("--config", QUICKSTART, "--data.device_batch_size", "0").facts())


def test_devices_as_a_list_of_numbers_in_text() -> None:
    assert (ranks_of({"devices": "0,1"}), ranks_of({"devices": "3,"}), ranks_of({"devices": -1})) == (2, 1, 1)
