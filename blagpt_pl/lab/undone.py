"""No layer silently undone: what one layer set, a later one may say anew, but not drop by the way.

    said anew     a plain value (number, text, true, false, null, a list of these) by any layer; a part, or an element
                  of a list, by a flag, which takes with it what the layer that named it said of it
    dropped       the rest: a part named by two files with different classes, a value below a part that is replaced (the
                  new part may have a value of that name, but that is another), an element appended to a list that is
                  assigned whole, an element removed that comes back

The first file is the base, there to be differed from: what becomes of its values is not watched, nor are they when a layer
that replaces a part says them again below it. A layer is watched key by key, so it may not undo itself either. Whether a text names a class is told by its look, `AdamW` or `torch.optim.AdamW`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.places import PART_KEYS, Place, class_name, operation, same_class

TEXT = (("name",), ("logs",), ("ckpt_path",))  # places whose text is never a class
COMMAND_LINE = "on the command line"
_CLASS = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*")
_DOES = {"named": "names another", "set": "sets", "listed": "assigns all of", "added": "adds", "removed": "removes"}
_MISSING = object()


@dataclass(frozen=True)
class Said:
    """One thing that a layer says.

    Attributes:
        path: of what; an element of a list is a step of its own, `[Class]`.
        verb: named (a class), set (a plain value), listed (an element of a list that is assigned whole), added, removed.
        value: the class, the plain value, or what the element is.
        count: how many such elements the list holds then.
        source: the layer.
    """

    path: Place
    verb: str
    value: object
    count: int
    source: str

    @property
    def owner(self) -> Place:
        """What was assigned: of an element that was listed, the list."""
        return self.path[:-1] if self.verb == "listed" else self.path

    @property
    def plain(self) -> bool:
        return self.verb != "named" and not _is_class(self.value, self.path)

    def holds(self, tree: dict) -> bool:
        """Whether a merged tree is still as it was said."""
        if self.verb in ("named", "set"):
            found = list(_reach(tree, self.path))
            if self.verb == "named":
                return any(same_class(_what(node), self.value) for node in found)
            if self.value == []:
                return any(isinstance(node, list) for node in found)
            return any(node == self.value and type(node) is type(self.value) for node in found)
        counts = [_count(node, self.value) for node in _reach(tree, self.path[:-1]) if isinstance(node, list)]
        return any(n <= self.count if self.verb == "removed" else n >= self.count for n in counts)


def shown(path: Place) -> str:
    """A path as it is written."""
    return ".".join(path).replace(".[", "[")


def _is_class(value: object, path: Place) -> bool:
    return isinstance(value, str) and path not in TEXT and _CLASS.fullmatch(value) is not None


def _what(node: object) -> object:
    """The class path of a part; anything else is what it is."""
    return node["class_path"] if isinstance(node, dict) and "class_path" in node else node


def _step(item: object) -> str:
    return f"[{class_name(item) or repr(item)}]"


def _count(items: object, what: object) -> int:
    return sum(same_class(_what(item), what) for item in items) if isinstance(items, list) else 0


def _reach(node: object, path: Place) -> Iterator[object]:
    """Everything that stands at a path; two elements of one class stand at one."""
    if not path:
        yield node
    elif path[0].startswith("["):
        for item in node if isinstance(node, list) else ():
            if _step(item) == path[0]:
                yield from _reach(item, path[1:])
    elif isinstance(node, dict):
        for values in (node, *(node.get(key) for key in PART_KEYS[1:])):
            if isinstance(values, dict) and path[0] in values and path[0] not in PART_KEYS:
                yield from _reach(values[path[0]], path[1:])


@dataclass(frozen=True)
class _Reader:
    """Reads what one key of a layer says, with the trees before and after it."""

    before: dict
    after: dict
    source: str

    def _one(self, path: Place, verb: str, value: object) -> Said:
        items = next(_reach(self.after, path[:-1]), None) if path else None
        return Said(path, verb, value, _count(items, value), self.source)

    def _element(self, path: Place, wanted: str) -> object:
        """The element of a list that a selector means."""
        for items in (*_reach(self.before, path), *_reach(self.after, path)):
            for i, item in enumerate(items if isinstance(items, list) else ()):
                if wanted in (str(i), _what(item), class_name(item)):
                    return item
        return wanted

    def key(self, key: str, value: object, path: Place = ()) -> Iterator[Said]:
        segments, change = operation(str(key))
        element = _MISSING
        for segment in segments:
            if segment in PART_KEYS:
                value = {"class_path": value} if segment == "class_path" else value
                continue
            name, *selectors = re.findall(r"[^\[\]]+", segment)
            path, element = (*path, name), _MISSING
            for wanted in selectors:
                element = self._element(path, wanted)
                path = (*path, _step(element))
        if change == "removed":
            for wanted in value if isinstance(value, list) else [value]:
                element = self._element(path, str(wanted))
                yield self._one((*path, _step(element)), "removed", _what(element))
        elif change:
            yield from self._elements(value if isinstance(value, list) else [value], path, "added")
        elif element is not _MISSING and not isinstance(_what(value), dict) and _what(element) != _what(value):
            yield self._one(path, "removed", _what(element))
            yield from self._elements([value], path[:-1], "added")
        else:
            yield from self._value(value, path)

    def _value(self, value: object, path: Place) -> Iterator[Said]:
        if isinstance(value, dict):
            if "class_path" in value:
                yield self._one(path, "named", value["class_path"])
            yield from self._values(value, path)
        elif isinstance(value, list) and value:
            yield from self._elements(value, path, "listed")
        else:
            yield self._one(path, "named" if _is_class(value, path) else "set", value)

    def _values(self, values: dict, path: Place) -> Iterator[Said]:
        for key, value in values.items():
            if key in PART_KEYS[1:]:
                yield from self._values(value or {}, path)
            elif key != "class_path":
                yield from self.key(key, value, path)

    def _elements(self, items: list, path: Place, verb: str) -> Iterator[Said]:
        for item in items:
            below = (*path, _step(item))
            yield self._one(below, verb, _what(item))
            if isinstance(item, dict) and "class_path" in item:
                yield from self._values(item, below)


class Watch:
    """Everything that the layers said and that still holds."""

    def __init__(self) -> None:
        self.said: list[Said] = []

    def see(self, key: str, value: object, before: dict, after: dict, source: str, is_base: bool = False) -> None:
        """Take note of one key of a layer, just merged.

        Args:
            key, value: what the layer says.
            before, after: the merged tree without and with it.
            source: the layer: a file, or `COMMAND_LINE`.
            is_base: whether the layer may be differed from at will.

        Raises:
            ConfigError: something that a layer said is dropped.
        """
        new = list(_Reader(before, after, source).key(key, value))
        renamed = [
            n
            for n in new
            if n.verb == "named" and not any(same_class(_what(node), n.value) for node in _reach(before, n.path))
        ]
        kept = []
        for one in [*self.said, *([] if is_base else [n for n in new if not _restated(n, renamed, before)])]:
            if one.holds(after):
                kept.append(one)
                continue
            others = [n for n in new if n is not one]
            replaced = [n for n in renamed if n.path == one.path[: len(n.path)] and n.path != one.path]
            if replaced and one in self.said and source != COMMAND_LINE:  # what it says below is of another part
                raise ConfigError(_dropped(one, replaced, source))
            if not (_anew(one, others) or self._taken_along(one, others)):
                raise ConfigError(_dropped(one, others, source))
        self.said = kept

    def _taken_along(self, one: Said, new: list[Said]) -> bool:
        """Whether a flag replaces the very part of which a layer said this when it named it."""
        return any(
            part.source == one.source and part.path == one.path[: len(part.path)] and part.path != one.path
            and part.verb in ("named", "listed", "added") and not part.plain and _anew(part, new)
            for part in self.said
        )  # fmt: skip


def _restated(one: Said, renamed: list[Said], before: dict) -> bool:
    """Whether what is said below a part that is replaced was so before: it fills the new part and is no difference."""
    return one.holds(before) and any(n.path == one.path[: len(n.path)] and n.path != one.path for n in renamed)


def _anew(one: Said, new: list[Said]) -> bool:
    """Whether what was said is said anew, by who may do so."""
    return any(
        (n.owner == one.owner or (n.path == one.path and n.verb != "listed"))
        and (one.plain or n.source == COMMAND_LINE or (one.verb == "removed" and n.source == one.source))
        for n in new
    )


def _dropped(one: Said, new: list[Said], source: str) -> str:
    """What to say of something that is dropped, by one of the things that are new."""
    above = [n for n in new if n.owner == one.path[: len(n.owner)]]
    below = [n for n in new if n.path[: len(one.path)] == one.path]
    cause = max(above, key=lambda n: len(n.owner), default=below[0] if below else one)
    place, who = shown(one.path), _who(one, source)
    undoes = f"undoes the removal of {place} by {who}" if one.verb == "removed" else f"drops {place} that {who} set"
    is_above = cause.verb == "named" and cause.path != one.path and one.source != source
    hint = f", or name {who} later, if the new {shown(cause.path)} takes that" if is_above else ""
    return f"{_DOES[cause.verb]} {shown(cause.owner)}, which {undoes}; fix: leave one of them out{hint}"


def _who(one: Said, source: str) -> str:
    if one.source == COMMAND_LINE:
        return "a flag"
    return "the same file" if one.source == source else one.source
