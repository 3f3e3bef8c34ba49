"""Trees of configuration: what a dotted key does in one, and how one is laid over another, as `lab/layers.py` says."""

import re

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.places import CLASS, PART_KEYS, class_name, operation, same_class

_SEGMENT = re.compile(r"^([\w-]*\w)((?:\[[\w.-]+\])*)$")


class NoElement(ConfigError):
    """A list has no such element.

    Attributes:
        name: what the list is called.
        wanted: the class or the index that was looked for.
    """

    def __init__(self, message: str, name: str, wanted: str) -> None:
        super().__init__(message)
        self.name, self.wanted = name, wanted


def alike(one: object, other: object) -> bool:
    """Whether two trees mean the same: `RMSNorm`, and a mapping that names it as class_path without any values, do."""
    if isinstance(one, str) and isinstance(other, str):
        return one == other or (same_class(one, other) and CLASS.fullmatch(one) is not None)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if _is_part(one) or _is_part(other):
        (name, values), (other_name, other_values) = _parted(one), _parted(other)
        return alike(name, other_name) and alike(values, other_values)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    kinds = {
        bool if isinstance(value, bool) else float if isinstance(value, int) else type(value) for value in (one, other)
    }
    return one == other and len(kinds) == 1  # 1 and 1.0 are one number, true is none


def _is_part(node: object) -> bool:
    return isinstance(node, dict) and "class_path" in node


def _parted(node: object) -> tuple[object, dict]:
    """The class of a part, and what else it says."""
    if not _is_part(node):
        return node, {}
    return node["class_path"], {k: v for k, v in node.items() if k != "class_path" and not (k in PART_KEYS and not v)}


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
        if items is not None and not isinstance(items, list):
            raise ConfigError(f"{key}: {name} is not a list, so [{wanted}] selects nothing")
        index = _index(items or [], wanted, f"[{wanted}]", key, name)
        container[place] = list(items)
        container, place = container[place], index
    return container, place


def _index(items: list, wanted: str, shown: str, key: str, name: str) -> int:
    """The place of the one element that is of a class, or stands at an index."""
    paths = [item.get("class_path") if isinstance(item, dict) else item for item in items]
    matches = [i for i, item in enumerate(items) if wanted in (str(i), paths[i], class_name(item))]
    if len(matches) != 1:
        if not items:
            raise NoElement(f"{key}: {name} holds nothing, so there is no {wanted} in it", name, wanted)
        found = ", ".join(str(class_name(item) or item) for item in items)
        if not matches:
            raise NoElement(f"{key}: no elements match {shown} (the list holds {found})", name, wanted)
        hint = f"; fix: an index, such as {shown.replace(wanted, str(matches[0]))}"
        raise ConfigError(f"{key}: {len(matches)} elements match {shown} (the list holds {found}){hint}")
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
            container[place] = _changed(old, value, change, key, name) if change else merge(old, value)
        elif isinstance(old, dict | str | None):
            container[place] = node = {"class_path": old} if isinstance(old, str) else dict(old or {})
        else:
            raise ConfigError(f"{key}: {'.'.join(segments[: i + 1])} holds {old!r}, which has no {segments[i + 1]!r}")


def _changed(old: object, value: object, change: str, key: str, name: str) -> list:
    """A list with elements appended, prepended or removed."""
    if old is not None and not isinstance(old, list):
        raise ConfigError(f"{key}: holds {class_name(old) or old!r}, not a list, so nothing can be {change}")
    if value is None:
        raise ConfigError(f"{key}: null, so there is nothing to be {change} (expected an element, or a list of them)")
    items, values = old or [], value if isinstance(value, list) else [value]
    if change == "removed":
        return _without(items, values, key, name)
    made = merge(None, values)
    return [*items, *made] if change == "appended" else [*made, *items]


def _without(items: list, values: list, key: str, name: str) -> list:
    """A list without some of its elements; indices are those of the list as it was."""
    gone: set[int] = set()
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ConfigError(f"{key}: {value!r} (expected the class of an element, its index, or a list of these)")
        index = _index(items, str(value), str(value), key, name)
        if index in gone:
            raise ConfigError(f"{key}: {value} is removed already")
        gone.add(index)
    return [item for i, item in enumerate(items) if i not in gone]
