"""The architecture that docs/models/README.md adds is one, as it stands there."""

import re
from pathlib import Path

import pytest
from shipped import BASELINE, CONFIGS

from blagpt_pl.lab import examine

PAGE = CONFIGS.parent / "docs" / "models" / "README.md"


def test_the_one_that_is_added_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text()
    for kind in ("python", "yaml"):
        name, body = re.search(rf"^```{kind}\n# (\S+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL).groups()
        (tmp_path / name).write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--config", str(BASELINE), "--config", "twice.yaml", "--model.losses+", "ZLoss"]
    header, verdicts = examine.examination(words)
    assert header["model"] == "Twice"
    assert {verdict.promise: verdict.found for verdict in verdicts if verdict.state != "kept"} == {}
