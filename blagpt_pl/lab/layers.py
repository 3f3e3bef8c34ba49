"""Configuration in layers: a complete base file, then differences, then flags; the last one to speak wins.

A layer is a mapping. Its keys may be dotted (`model.block.attention.edits+`), reaching through a part's `init_args`
without naming them:

    a.b.c: value        set, merging mappings
    a.b.c+: value       append to a list: an element, or a list of them
    a.b.+c: value       prepend to a list, the order kept
    a.b.c-: RoPE        remove from a list the element that is a RoPE; an index works too, and a list of either
    a.b[RoPE].theta: v  the element of a list that is a RoPE; an index works too

A part is a class name, or a mapping with `class_path` (and `init_args`, which may be left out). Naming another class
replaces the part with all its values; naming the same class, or only some of its values, keeps the others. jsonargparse
instead keeps every value that the new class happens to accept, which is why the layers are merged here before it sees them.
What a layer would undo of an earlier one by the way is refused (`lab/undone.py`).
Two names are the same class if they are equal, or if one of them is bare and the other is that name in the house, in torch
or in Lightning: `AdamW` over `torch.optim.AdamW` keeps its values, `RMSNorm` over `my_ideas.RMSNorm` replaces it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import yaml

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.places import PART_KEYS, Place, class_name, operation, places_in, same_class, same_place, split
from blagpt_pl.lab.strict_yaml import compose_text, load_mapping, load_text, read_file
from blagpt_pl.lab.undone import COMMAND_LINE, Watch

PLAIN_TEXT = ("name", "logs", "ckpt_path")  # flags whose value is text, also where it looks like a number
_MARK = yaml.Mark("", 0, 0, 0, None, None)
_SEGMENT = re.compile(r"^([\w-]*\w)((?:\[[\w.-]+\])*)$")


def merge(old: object, new: object) -> object:
    """`new` over `old`, both left as they are: parts and mappings merge as the module says, all else is replaced."""
    if isinstance(new, list):
        return [merge(None, item) for item in new]
    if isinstance(new, str) and isinstance(old, dict) and same_class(old.get("class_path"), new):
        new = {"class_path": new}
    if not isinstance(new, dict):
        return new
    base = {"class_path": old} if isinstance(old, str) else dict(old) if isinstance(old, dict) else {}
    if "class_path" in new:
        name = base.get("class_path")
        base = base if same_class(name, new["class_path"]) else {}
        base["class_path"] = (
            max(name, new["class_path"], key=len) if base and isinstance(name, str) else new["class_path"]
        )
    for key, value in new.items():
        if key != "class_path" and not (key == "init_args" and value is None):
            put(base, key, value)
    return base


def _select(parent: dict, name: str, selectors: str, key: str) -> tuple[list | dict, str | int]:
    """Follow `[...]` selectors after a name: the container and the key or index in it."""
    container, place = parent, name
    for wanted in re.findall(r"\[([\w.-]+)\]", selectors):
        items = container[place] if isinstance(container, list) else container.get(place)
        if not isinstance(items, list):
            raise ConfigError(f"{key}: {name} is not a list, so [{wanted}] selects nothing")
        index = _index(items, wanted, f"[{wanted}]", key)
        container[place] = list(items)
        container, place = container[place], index
    return container, place


def _index(items: list, wanted: str, shown: str, key: str) -> int:
    """The place of the one element that is of a class, or stands at an index."""
    paths = [item.get("class_path") if isinstance(item, dict) else item for item in items]
    matches = [i for i, item in enumerate(items) if wanted in (str(i), paths[i], class_name(item))]
    if len(matches) != 1:
        found = ", ".join(str(class_name(item) or item) for item in items) or "nothing"
        hint = f"; fix: an index, such as {shown.replace(wanted, str(matches[0]))}" if matches else ""
        raise ConfigError(f"{key}: {len(matches) or 'no'} elements match {shown} (the list holds {found}){hint}")
    return matches[0]


def put(tree: dict, key: str, value: object) -> None:
    """Do in a tree what a dotted key says. Only `tree` itself is changed in place, nothing below it.

    Raises:
        ConfigError: the key cannot be followed.
    """
    key = str(key)
    segments, change = operation(key)
    if len(segments) > 1 and segments[-1] == "class_path":  # a part is named: its values go with its class
        segments, value = segments[:-1], {"class_path": value}
    node = tree
    for i, segment in enumerate(segments):
        match = _SEGMENT.match(segment)
        if not match:
            raise ConfigError(
                f"{key}: cannot be read as a path (expected names joined by dots, `[Class]` for an element)"
            )
        name, selectors = match.groups()
        if "class_path" in node and name not in PART_KEYS:
            values = node.get("init_args")
            node["init_args"] = node = dict(values) if isinstance(values, dict) else {}
        container, place = _select(node, name, selectors, key)
        old = container[place] if isinstance(container, list) else container.get(place)
        if i == len(segments) - 1:
            container[place] = _changed(old, value, change, key) if change else merge(old, value)
        elif isinstance(old, dict | str | None):
            container[place] = node = {"class_path": old} if isinstance(old, str) else dict(old or {})
        else:
            raise ConfigError(f"{key}: {'.'.join(segments[: i + 1])} holds {old!r}, which has no {segments[i + 1]!r}")


def _changed(old: object, value: object, change: str, key: str) -> list:
    """A list with elements appended, prepended or removed."""
    if old is not None and not isinstance(old, list):
        raise ConfigError(f"{key}: holds {class_name(old) or old!r}, not a list, so nothing can be {change}")
    if value is None:
        raise ConfigError(f"{key}: null, so there is nothing to be {change} (expected an element, or a list of them)")
    items, values = old or [], value if isinstance(value, list) else [value]
    if change == "removed":
        return _without(items, values, key)
    made = merge(None, values)
    return [*items, *made] if change == "appended" else [*made, *items]


def _without(items: list, values: list, key: str) -> list:
    gone: set[int] = set()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(f"{key}: {value!r} (expected the class of an element, its index, or a list of these)")
        index = _index(items, str(value), str(value), key)
        if index in gone:
            raise ConfigError(f"{key}: {value} is removed already")
        gone.add(index)
    return [item for i, item in enumerate(items) if i not in gone]


def flag_value(text: str, flag: str) -> object:
    """The value of a command-line flag: YAML where it is a number, true, false, null, [..], {..} or quoted; else text."""
    if text[:1] in ("[", "{"):
        return load_text(text, f"--{flag}")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    if flag in PLAIN_TEXT and text != "null":
        return text
    may_mean_more = re.fullmatch(r"[+-]?\.?\w[\w.+-]*|~", text)  # as a number, true, false or null do
    return load_text(text, f"--{flag}") if may_mean_more else text


@dataclass
class Layers:
    """The merged tree, the flags that are not layers, and where each layer speaks of what.

    Attributes:
        tree: all layers merged.
        rest: flags passed on.
        places: (path, `FILE:LINE` or `on the command line`) of everything that is said, in order.
        files: how many files have been merged; the first is the base.
        watch: sees to it that no layer is silently undone.
    """

    tree: dict = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    places: list[tuple[Place, str]] = field(default_factory=list)
    files: int = 0
    watch: Watch = field(default_factory=Watch)

    def where(self, path: str) -> str:
        """` (in FILE:LINE)` of the last layer that speaks of a path, else of what is below or above it; or nothing."""
        wanted = tuple(split(path))
        while wanted:
            for loosely in (False, True):
                for place, source in reversed(self.places):
                    if same_place(place, wanted, loosely):
                        return f" ({source})"
            for place, source in reversed(self.places):
                if place[: len(wanted)] == wanted:
                    return f" ({source})"
            wanted = wanted[:-1]
        return ""

    def add_file(self, path: str) -> None:
        """Merge a file over the tree."""
        text = read_file(path)
        for key, value in load_mapping(text, path).items():
            try:
                if key in PART_KEYS:
                    raise ConfigError(f"{key}: stands at the top (expected inside a part, such as model)")
                self._put(key, value, path)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
        self.files += 1
        self.places += [(place, f"in {path}:{line}") for place, line in places_in(compose_text(text, path))]

    def _put(self, key: object, value: object, source: str) -> None:
        before = dict(self.tree)
        put(self.tree, key, value)
        self.watch.see(key, value, before, self.tree, source, is_base=source != COMMAND_LINE and not self.files)

    def add_flag(self, flag: str, text: str) -> None:
        """Merge a flag over the tree."""
        value = flag_value(text, flag)
        self._put(flag, value, COMMAND_LINE)
        node = yaml.MappingNode("", [(yaml.ScalarNode("", flag, _MARK), yaml.ScalarNode("", text, _MARK))])
        if isinstance(value, dict | list):
            node.value[0] = (node.value[0][0], compose_text(text, f"--{flag}"))
        self.places += [(place, COMMAND_LINE) for place, _ in places_in(node)]


def from_arguments(argv: Iterable[str], passed_on: Iterable[str] = ()) -> Layers:
    """Merge the layers that a command line names, left to right.

    Args:
        argv: what stands after the command: `--config FILE`, `--a.b value`, `--a.b=value`, `--a.b+=value`,
            `--a.+b=value`, `--a.b-=Class`.
        passed_on: flags that are not layers.

    Raises:
        ConfigError: a flag without a value, a word that belongs to no flag, or a layer that cannot be read.
    """
    layers = Layers()
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") and word.partition("=")[0] != "-c":
            raise ConfigError(f"{word!r}: belongs to no flag (expected --config FILE or --key value)")
        flag, equals, text = word.lstrip("-").partition("=")
        if flag in passed_on or flag == "help" or flag.endswith(".help"):
            layers.rest.append(word)
            if flag.endswith(".help") and not equals and words and not words[0].startswith("-"):
                layers.rest.append(words.pop(0))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{flag}: has no value (expected --{flag} VALUE or --{flag}=VALUE)")
            text = words.pop(0)
        if flag in ("config", "c"):
            layers.add_file(text)
        else:
            layers.add_flag(flag, text)
    return layers
