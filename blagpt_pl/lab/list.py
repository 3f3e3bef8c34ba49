"""`blagpt list`: the parts, overlays and configurations that there are, with what they are and where they come from."""

import argparse
import difflib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.catalogue import KINDS, OVERLAYS, Entry, configs_folder, configurations, parts, torch_optimizers

GROUPS = {  # a word that means several kinds
    "attention": ("attention", "edit", "core"),
    "data": ("source", "tokenizer"),
    "part": tuple(kind for kind in KINDS if kind not in ("optimizer", "model", "source", "tokenizer", "callback")),
}
ORDER = (*KINDS, "technique", "trainer", "config")
WIDE = 120  # columns from which authors are shown, too
ALIASES = {"mixer": "attention", "term": "loss", "optim": "optimizer", "position": "positions", "overlay": "technique"}


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    p = argparse.ArgumentParser(
        prog="blagpt list",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="What there is to choose from: parts, overlays, configurations, each with its paper.",
        epilog=f"kinds: {', '.join(ORDER[:13])},\n       {', '.join(ORDER[13:])}\n"
        "groups: attention (mixers, edits and cores), data (sources and tokenizers), part (all that a model is made of)\n"
        "A plural will do. torch's optimizers are counted, and listed by `blagpt list optimizer`.",
    )
    p.add_argument("kind", nargs="?", help="only this kind, or this group of kinds")
    p.add_argument("--json", action="store_true", help="a list of objects: kind, name, text, paper, file, socket")
    return p


def kinds_of(word: str) -> tuple[str, ...]:
    """The kinds that a word means.

    Raises:
        ConfigError: it means none.
    """
    lower = word.lower().replace("-", "_")
    known = dict.fromkeys((*ORDER, *GROUPS, *ALIASES))
    for one in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if one in known:
            return GROUPS.get(one) or (ALIASES.get(one, one),)
    near = difflib.get_close_matches(lower, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    listed = ", ".join(dict.fromkeys((*ORDER, *GROUPS)))
    raise ConfigError(f"{word}: is no kind of thing to list (expected {listed}){hint}")


def entries(kinds: tuple[str, ...]) -> list[Entry]:
    """All that there is of some kinds."""
    folder = configs_folder()
    found = [*parts(), *(torch_optimizers() if "optimizer" in kinds else ())]
    found += configurations(folder) if folder else ()
    return [entry for kind in kinds for entry in found if entry.kind == kind]


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: room - 3].rstrip(" ,;:") + "..."


def table(found: list[Entry], width: int) -> list[str]:
    """Aligned lines: the name, the text as far as it fits, the paper; of it only the arXiv id where lines are short."""
    rows = []
    for entry in found:
        paper = entry.paper if width >= WIDE else entry.paper.rpartition(", ")[2]
        rows.append((_short(entry), entry.text, _cut(paper, 50)))
    names, papers = (max((len(row[i]) for row in rows), default=0) for i in (0, 2))
    room = max(width - names - papers - 6, 16)
    return [f"  {name:<{names}}  {_cut(text, room):<{room}}  {paper}".rstrip() for name, text, paper in rows]


def _short(entry: Entry) -> str:
    """What the line begins with: of a file that its section's title names, the varying part."""
    return entry.name if entry.kind in KINDS else Path(entry.name).stem


def main(argv: list[str]) -> None:
    """Print what there is."""
    args = parser().parse_args(argv)
    kinds = kinds_of(args.kind) if args.kind else ORDER
    found = entries(kinds)
    if args.json:
        sockets = [{**asdict(e), "socket": KINDS[e.kind][1] if e.kind in KINDS else None} for e in found]
        print(json.dumps(sockets, indent=1, ensure_ascii=False))
        return
    width = shutil.get_terminal_size((110, 24)).columns
    print("\n\n".join("\n".join(section) for section in sections(found, kinds, width, brief=args.kind is None)))
    if configs_folder() is None and not set(kinds).isdisjoint(("config", *OVERLAYS.values())):
        print("\nno folder configs here or beside the package: overlays and complete configurations are not shown")


def sections(found: list[Entry], kinds: tuple[str, ...], width: int, brief: bool) -> list[list[str]]:
    """The lines of each kind; in brief, torch's optimizers are only counted."""
    made = []
    for kind in kinds:
        here = [entry for entry in found if entry.kind == kind]
        if not here:
            continue
        shown = [e for e in here if not (brief and e.file == "torch.optim")]
        files = f"--config {Path(here[0].name).with_name('NAME.yaml')}"
        lines = [f"{kind}  {KINDS[kind][1] if kind in KINDS else files}", *table(shown, width)]
        if len(shown) < len(here):
            lines.append(f"  {len(here) - len(shown)} of torch.optim: blagpt list optimizer")
        made.append(lines)
    return made
