"""What the numbers of a part are sizes of, as its class says: `sizes`, a constructor's argument -> what it is measured in.

width        numbers of a vector: goes with the width of the stream
head         numbers of a head, where it is not the stream's width over the heads: small and even, in one proportion
heads        how many heads: those of one part go together, and the stream's width is a multiple of them
tokens       a length of text, or a list of lengths: goes with the context
strides      steps that divide the part's tokens, one each
layers       how many blocks
pattern      a word with a letter for each block, which says its kind
vocabulary   how many different tokens

A class that says nothing of an argument is taken to need it as it is. A subclass has the sizes of the classes above it,
and says its own. The first `width` and the greatest `layers` of the model are those that all others go with.
"""

import functools
import inspect
import re
from collections.abc import Iterator

from torch import nn

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.mistakes import imported, options
from blagpt_pl.lab.parts import known_classes
from blagpt_pl.lab.places import CLASS

MEASURES = ("width", "head", "heads", "tokens", "strides", "layers", "pattern", "vocabulary")


def class_of(part: object) -> type | None:
    """The class that a node of a configuration names, alone or as class_path; None where it names none."""
    name = part.get("class_path") if isinstance(part, dict) else part
    if not isinstance(name, str) or not re.fullmatch(CLASS, name):
        return None
    if "." in name:
        cls, _ = imported(name)
        return cls if inspect.isclass(cls) else None
    return next((c for c in known_classes() if c.__name__ == name), None) or _stranger(name)


def _stranger(name: str) -> type | None:
    """A module of that name which is loaded, but not of the house."""
    pending: list[type] = [nn.Module]
    while pending:
        cls = pending.pop()
        if cls.__name__ == name:
            return cls
        pending += cls.__subclasses__()
    return None


@functools.cache
def sizes_of(cls: type) -> dict[str, str]:
    """What the arguments of a class are measured in, those of the classes above it included.

    Raises:
        ConfigError: the class names an argument that it does not take, or a measure that there is not.
    """
    if not any(map(own_sizes, cls.__mro__)):
        return {}  # reading a signature takes time
    taken, found = options(cls), {}
    for one in reversed(cls.__mro__):
        said = own_sizes(one)
        for name, measure in said.items():
            if measure not in MEASURES:
                raise ConfigError(f"{one.__name__}.sizes: {name}: {measure!r} (expected one of {', '.join(MEASURES)})")
            if one is cls and name not in taken:
                raise ConfigError(f"{one.__name__}.sizes: {name!r} is no argument of it (it has {', '.join(taken)})")
        found |= said
    return {name: measure for name, measure in found.items() if name in taken}


def measured(part: object) -> dict[str, dict[str, object]]:
    """A part's sizes by what they are measured in, as they are said or else by default; null ones are left out."""
    cls = class_of(part)
    found: dict[str, dict[str, object]] = {}
    if cls is None:
        return found
    said = (part.get("init_args") or {}) if isinstance(part, dict) else {}
    for name, measure in sizes_of(cls).items():
        value = said.get(name, options(cls)[name].default)
        if measure == "pattern" and isinstance(value, str):
            found.setdefault(measure, {})[name] = value
        elif _is_size(value) or (isinstance(value, list | tuple) and value and all(map(_is_size, value))):
            found.setdefault(measure, {})[name] = list(value) if isinstance(value, tuple) else value
    return found


def own_sizes(cls: type) -> dict[str, str]:
    """What a class says of itself; another attribute that happens to be called so is none of it."""
    said = vars(cls).get("sizes")
    return said if isinstance(said, dict) else {}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def parts_in(node: object) -> Iterator[object]:
    """Every part in a tree, from the outside in: nodes that name a class, alone or as class_path."""
    if isinstance(node, dict):
        if "class_path" in node:
            yield node
        for key, value in node.items():
            if key != "class_path":
                yield from parts_in(value)
    elif isinstance(node, list):
        for item in node:
            yield from parts_in(item)
    elif isinstance(node, str) and class_of(node) is not None:
        yield node
