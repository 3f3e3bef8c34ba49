"""What a layer says, one thing at a time: this class here, that value there, an element more or less in a list.

Whether a text names a class is told by its look, `AdamW` or `torch.optim.AdamW`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from blagpt_pl.lab.places import CLASS, PART_KEYS, Place, class_name, operation, same_class

TEXT = (("name",), ("logs",), ("ckpt_path",))  # places whose text is never a class
_MISSING = object()


@dataclass(frozen=True)
class Said:
    """One thing that a layer says.

    Attributes:
        path: of what; an element of a list is a step of its own, `[Class]`.
        verb: named (a class), set (a plain value), listed (an element of a list that is assigned whole), added, removed.
        value: the class, the plain value, or what the element is.
        count: how many such elements the list holds then.
        source: the layer: a file, or a flag with its dashes.
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
    def by_flag(self) -> bool:
        return is_flag(self.source)

    @property
    def layer(self) -> str:
        """The file; all flags together are one layer."""
        return "--" if self.by_flag else self.source

    @property
    def plain(self) -> bool:
        return self.verb != "named" and not _is_class(self.value, self.path)

    def holds(self, tree: dict) -> bool:
        """Whether a merged tree is still as it was said."""
        if self.verb in ("named", "set"):
            found = list(reach(tree, self.path))
            if self.verb == "named":
                return any(same_class(what_is(node), self.value) for node in found)
            if self.value == []:
                return any(isinstance(node, list) for node in found)
            return any(node == self.value and type(node) is type(self.value) for node in found)
        counts = [_count(node, self.value) for node in reach(tree, self.path[:-1]) if isinstance(node, list)]
        return any(n <= self.count if self.verb == "removed" else n >= self.count for n in counts)


def is_flag(source: str) -> bool:
    """Whether a layer is a flag."""
    return source.startswith("--")


def shown(path: Place) -> str:
    """A path as it is written."""
    return ".".join(path).replace(".[", "[")


def _is_class(value: object, path: Place) -> bool:
    return isinstance(value, str) and path not in TEXT and CLASS.fullmatch(value) is not None


def what_is(node: object) -> object:
    """The class path of a part; anything else is what it is."""
    return node["class_path"] if isinstance(node, dict) and "class_path" in node else node


def _step(item: object) -> str:
    return f"[{class_name(item) or repr(item)}]"


def _count(items: object, what: object) -> int:
    return sum(same_class(what_is(item), what) for item in items) if isinstance(items, list) else 0


def reach(node: object, path: Place) -> Iterator[object]:
    """Everything that stands at a path; two elements of one class stand at one."""
    if not path:
        yield node
    elif path[0].startswith("["):
        for item in node if isinstance(node, list) else ():
            if _step(item) == path[0]:
                yield from reach(item, path[1:])
    elif isinstance(node, dict):
        for values in (node, *(node.get(key) for key in PART_KEYS[1:])):
            if isinstance(values, dict) and path[0] in values and path[0] not in PART_KEYS:
                yield from reach(values[path[0]], path[1:])


@dataclass(frozen=True)
class Reader:
    """Reads what one key of a layer says, with the trees before and after it."""

    before: dict
    after: dict
    source: str

    def _one(self, path: Place, verb: str, value: object) -> Said:
        items = next(reach(self.after, path[:-1]), None) if path else None
        return Said(path, verb, value, _count(items, value), self.source)

    def _element(self, path: Place, wanted: str) -> object:
        """The element of a list that a selector means."""
        for items in (*reach(self.before, path), *reach(self.after, path)):
            for i, item in enumerate(items if isinstance(items, list) else ()):
                if wanted in (str(i), what_is(item), class_name(item)):
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
                yield self._one((*path, _step(element)), "removed", what_is(element))
        elif change:
            yield from self._elements(value if isinstance(value, list) else [value], path, "added")
        elif element is not _MISSING and not isinstance(what_is(value), dict) and what_is(element) != what_is(value):
            yield self._one(path, "removed", what_is(element))
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
            yield self._one(below, verb, what_is(item))
            if isinstance(item, dict) and "class_path" in item:
                yield from self._values(item, below)
