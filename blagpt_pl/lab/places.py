"""The words of a configuration: class names, dotted keys, and which line speaks of what, so that an error can name it."""

import re
from collections.abc import Iterable, Iterator

import yaml

LIBRARIES = ("blagpt_pl.", "torch.", "lightning.")  # a bare class name may mean one of theirs
PART_KEYS = ("class_path", "init_args", "dict_kwargs")
CLASS = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*")  # how the name of a class looks

Place = tuple[str, ...]


def class_name(part: object) -> str | None:
    """The bare class name of a part, or None if it is not one."""
    path = part.get("class_path") if isinstance(part, dict) else part
    return path.rsplit(".", 1)[-1] if isinstance(path, str) else None


def same_class(one: object, other: object) -> bool:
    """Whether two class names mean the same class, as `lab/layers.py` says."""
    if one == other or not isinstance(one, str) or not isinstance(other, str):
        return one == other
    bare, full = sorted((one, other), key=len)
    return "." not in bare and full.startswith(LIBRARIES) and full.endswith("." + bare)


def split(key: str) -> list[str]:
    """The segments of a dotted key; a selector may hold dots."""
    return re.split(r"\.(?![^\[]*\])", key)


def operation(key: str) -> tuple[list[str], str]:
    """The segments of a dotted key, and what it says is to be done to the list there; nothing for a plain key."""
    if key.endswith("+"):
        return split(key[:-1]), "appended"
    if key.endswith("-"):
        return split(key[:-1]), "removed"
    segments = split(key)
    if segments[-1].startswith("+"):
        return [*segments[:-1], segments[-1][1:]], "prepended"
    return segments, ""


def _in_list(nodes: Iterable[yaml.Node], path: Place) -> Iterator[tuple[Place, int]]:
    for node in nodes:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        named = [node] if isinstance(node, yaml.ScalarNode) else [v for k, v in pairs if k.value == "class_path"]
        name = str(named[0].value).rsplit(".", 1)[-1] if named else ""
        element = (*path[:-1], f"{path[-1]}[{name}]")
        yield element, node.start_mark.line + 1
        yield from places_in(node, element)


def places_in(node: yaml.Node | None, path: Place = ()) -> Iterator[tuple[Place, int]]:
    """Every path that a YAML text speaks of, and its line; a part's class_path is the path of the part."""
    if isinstance(node, yaml.SequenceNode) and path:
        yield from _in_list(node.value, path)
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        items = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.tag.endswith(":merge"):
            for merged in items:
                yield from places_in(merged, path)
            continue
        segments, change = operation(key.value)
        below = (*path, *(segment for segment in segments if segment not in PART_KEYS))
        if key.value != "init_args":
            yield below, key.start_mark.line + 1
        if change in ("appended", "prepended"):
            yield from _in_list(items, below)
        elif not change:
            yield from places_in(value, below)


def same_place(one: Place, other: Place, loosely: bool) -> bool:
    """Whether two paths may mean one place: an index is any class; loosely, so is a selector that is left out."""

    def same(a: str, b: str) -> bool:
        (name_a, _, in_a), (name_b, _, in_b) = a.partition("["), b.partition("[")
        is_index = in_a[:-1].isdigit() or in_b[:-1].isdigit()
        return a == b or (name_a == name_b and (is_index if in_a and in_b else loosely))

    return len(one) == len(other) and all(map(same, one, other))
