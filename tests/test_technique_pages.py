"""Every technique has one page, every page the same sections, and every overlay stands on exactly one of them."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for p in (ROOT / "docs/techniques").glob("*.md") if p.name != "README.md")
OVERLAYS = sorted(p for room in ("techniques", "models") for p in (ROOT / f"configs/{room}").glob("*.yaml"))
SECTIONS = ["Formula", "Cost", "Claims", "Here"]
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
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    bodies = re.split(r"^## .+$", text, flags=re.MULTILINE)[1:]
    assert all(len(body.strip()) > 40 for body in bodies)
    assert {"Source", "Where", "Overlay"} <= rows(text).keys()
    assert any(name.startswith("Combines") for name in rows(text))
    assert len(text.splitlines()) <= 60


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
