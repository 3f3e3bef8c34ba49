"""A configuration file that is not there: at most three that may have been meant, wherever they lie."""

from pathlib import Path

import pytest

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.config_files import read_file

ROOT = Path(__file__).resolve().parents[2]


def said(path: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_file(str(path))
    return str(error.value)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("kv_shift", "configs/techniques/kv_shift.yaml"),
        ("kv_shift.yaml", "configs/techniques/kv_shift.yaml"),
        ("kvshift", "configs/techniques/kv_shift.yaml"),
        ("configs/kv_shift.yaml", "configs/techniques/kv_shift.yaml"),
        ("configs/techniques/kv_shfit.yaml", "configs/techniques/kv_shift.yaml"),
        ("configs/technique/kv_shift.yaml", "configs/techniques/kv_shift.yaml"),
        ("blagtp", "configs/blagpt.yaml"),
        ("ddp", "configs/trainer/ddp8.yaml"),
        ("TokenFormer", "configs/models/tokenformer.yaml"),
    ],
)
def test_the_nearest_is_named_first(typed: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = said(typed)
    assert text.startswith(f"--config: {typed!r}: no such file (in {ROOT}); did you mean {meant}")
    assert text.endswith("?")
    assert text.count(".yaml", text.index("did you mean")) <= 3


def test_files_beside_it_come_before_others_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mine/nope.yaml", "nope.yaml", "configs/techniques/nope.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a: 1")
    assert said("mine/nop.yaml").endswith("; did you mean mine/nope.yaml or configs/techniques/nope.yaml or nope.yaml?")


def test_at_most_three_and_none_that_is_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for i in range(6):
        (tmp_path / f"wide{i}.yaml").write_text("a: 1")
    assert said("wide").count(" or ") == 2
    assert said("zzzzzz").endswith(f"no such file (in {tmp_path})")
    assert "is a folder" in said(tmp_path)
    assert "no such file" in said(tmp_path / "no" / "where.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    assert "cannot be read as text" in said(tmp_path / "x.yaml")
