"""docs/adding-a-technique.md, as it stands there: its part keeps its promises, trains, and its command lines parse."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from helpers import attention, batch, block, carry_of, heads, qk_norm, shake, tiny

from blagpt_pl.lab.catalogue import FIRST_LINE
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.train import run
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.testing import check_part

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/adding-a-technique.md").read_text()


def fenced(language: str) -> list[str]:
    """The code blocks of a language, unindented where they stand in a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", PAGE, re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def command_lines() -> list[list[str]]:
    """The words after `blagpt fit` of every line that the page tells to run."""
    lines = [line for text in fenced("bash") for line in text.splitlines() if line.startswith("blagpt fit ")]
    return [shlex.split(line.replace("$CHECKOUT", str(ROOT)))[2:] for line in lines]


@pytest.fixture
def my_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's file in an empty folder, which is the current one."""
    (text,) = fenced("python")
    (tmp_path / "my_edit.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("my_edit", tmp_path / "my_edit.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_edit", module)
    spec.loader.exec_module(module)
    return module


def with_edits(*edits: type) -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny(block=block(attention=attention(edits=list(edits))))


def test_the_part_keeps_its_promises(my_edit: ModuleType) -> None:
    (text,) = fenced("python")
    assert len(text.splitlines()) < 30
    check_part(my_edit.HeadTemperature)
    assert "check_part(HeadTemperature)" in "".join(fenced("bash"))


def test_the_broken_one_is_told_as_the_page_says(my_edit: ModuleType) -> None:
    class HeadTemperature(my_edit.HeadTemperature):
        def forward(self, q, k, v, carry):
            return super().forward(q, k.roll(-1, 2), v, carry)

    with pytest.raises(AssertionError) as told:
        check_part(HeadTemperature)
    (said,) = re.findall(r"^AssertionError: (.*)$", PAGE, re.MULTILINE)
    assert re.sub(r"\d[\d.e+-]*", "N", str(told.value)) == re.sub(r"\d[\d.e+-]*", "N", said)


def test_it_is_its_formula(my_edit: ModuleType) -> None:
    edit = shake(my_edit.HeadTemperature(heads(4, 2, 8)), std=0.5)
    q, k, v = (torch.randn(2, n, 13, 8) for n in (4, 2, 2))
    new_q, new_k, new_v = edit(q, k, v, carry_of(v))
    assert all(torch.equal(new_q[:, h], q[:, h] * edit.log_scale[h].exp()) for h in range(4))
    assert new_k is k
    assert new_v is v


def test_two_steps_from_the_baselines_start(my_edit: ModuleType) -> None:
    model, baseline = with_edits(qk_norm, RoPE, my_edit.HeadTemperature), with_edits(qk_norm, RoPE)
    assert torch.equal(model(batch(model)[0]), baseline(batch(model)[0]))  # the same dice, the same start
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss, _ = model.objective(*batch(model))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(layer.attention.part.edits[2].log_scale.any() for layer in model.blocks)


def test_before_qk_norm_it_would_do_nothing(my_edit: ModuleType) -> None:
    x = torch.randn(2, 13, 32)
    gaps = []
    for edits in ([my_edit.HeadTemperature, qk_norm, RoPE], [qk_norm, RoPE, my_edit.HeadTemperature]):
        part = shake(with_edits(*edits), std=0.5).eval().blocks[0].attention.part
        before = part(x, carry_of(x))
        (edit,) = (e for e in part.edits if isinstance(e, my_edit.HeadTemperature))
        torch.nn.init.constant_(edit.log_scale, 1.0)
        gaps.append((part(x, carry_of(x)) - before).abs().max().item())
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-2


@pytest.mark.parametrize("words", command_lines(), ids=lambda words: words[words.index("--name") + 1])
def test_a_command_line_is_understood(my_edit: ModuleType, words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as done:
        run("fit", [*words, *re.search(r"`(--trainer.max_steps [^`]*)`", PAGE)[1].split(), "--print_config"])
    assert not done.value.code
    block = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["block"]["init_args"]
    edits = [edit["class_path"].rsplit(".", 1)[-1] for edit in block["attention"]["init_args"]["edits"]]
    assert edits == ["QKNorm", "RoPE", "HeadTemperature"][: 3 if "temperature" in words else 2]


def test_the_overlay_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = fenced("yaml")
    assert FIRST_LINE.fullmatch(text.splitlines()[0])
    (tmp_path / "head_temperature.yaml").write_text(text)
    files = (ROOT / "configs/blagpt.yaml", tmp_path / "head_temperature.yaml")
    tree = from_arguments([word for file in files for word in ("--config", str(file))]).tree
    edits = tree["model"]["init_args"]["block"]["init_args"]["attention"]["init_args"]["edits"]
    assert edits[-1] == "HeadTemperature"


def test_what_the_page_names_exists() -> None:
    new = "head_temperature"
    named = set(re.findall(r"(?:configs|tests|blagpt_pl|docs)/[\w/]+(?:\.(?:yaml|py|md))?", PAGE))
    missing = sorted(name for name in named if new not in name and not (ROOT / name).exists())
    assert not missing
