"""Every technique and every model has one page, every page the same sections, and every overlay stands on exactly one of them."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("techniques", "models")
PAGES = sorted(p for room in ROOMS for p in (ROOT / f"docs/{room}").glob("*.md") if p.name != "README.md")
OVERLAYS = sorted(p for room in ROOMS for p in (ROOT / f"configs/{room}").glob("*.yaml"))
SECTIONS = ["Formula", "Cost", "Claims", "Here"]
LINES = {"techniques": 60, "models": 120}  # a model's page has a drawing, and may have sections of its own
PATH = re.compile(r"configs/(?:techniques|models)/\w+\.yaml")


def rows(text: str) -> dict[str, str]:
    """The first table of a page: what stands in its second column, by what stands in its first."""
    table = re.search(r"^\| \| \|\n\| ?-+ ?\| ?-+ ?\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table, "no table that begins with an empty head: | | |"
    cells = [re.split(r"(?<!\\)\|", line.strip().strip("|"), maxsplit=1) for line in table[1].splitlines()]
    return {name.strip(): value.strip() for name, value in cells}


def overlays_of(page: Path) -> list[str]:
    """The overlays whose page this is: those in its row of that name."""
    return PATH.findall(rows(page.read_text())["Overlay"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_has_its_sections(page: Path) -> None:
    text = page.read_text()
    assert re.match(r"# .+\n\n(?:[^\n#|].*\n)+\n\| \| \|\n", text), "expected a title, one paragraph, and the table"
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    is_model = page.parent.name == "models"
    assert [name for name in sections if name in SECTIONS or not is_model] == SECTIONS
    assert ("```mermaid\n" in text or ".svg" in text) or not is_model, "expected a drawing of the data flow"
    bodies = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(body.strip()) > 40 for body in bodies)
    assert {"Source", "Where", "Overlay"} <= rows(text).keys()
    assert any(name.startswith("Combines") for name in rows(text))
    assert len(text.splitlines()) <= LINES[page.parent.name]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(r"(?:configs|tests|blagpt_pl|docs)/[\w/]+\.(?:yaml|py|md)", text))
    missing = sorted(name for name in named if not (ROOT / name).is_file())
    assert not missing, f"{page.name} names {missing}"
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert all((page.parent / link).exists() for link in links)
    assert overlays_of(page), "names no overlay in its row"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_says_what_holds_it(page: Path) -> None:
    here = page.read_text().partition("## Here")[2]
    assert re.search(r"`tests/\S+\.py`", here), "names no test"
    assert re.search(r"No\s+training\s+run\s+of\s+ours\s+yet\.", here) or "logs/" in here or "results" in here


def test_every_overlay_has_exactly_one_page() -> None:
    found = Counter(name for page in PAGES for name in overlays_of(page))
    expected = Counter(str(p.relative_to(ROOT)) for p in OVERLAYS)
    assert found == expected, f"missing {sorted(expected - found)}, too many {sorted(found - expected)}"
