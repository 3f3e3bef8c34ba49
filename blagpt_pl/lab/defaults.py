"""What a part does where a configuration does not say: the defaults of its class, so that saying them is no change."""

import functools
import inspect
import sys

from blagpt_pl.lab.parts import known_classes


def with_defaults(node: object) -> object:
    """A tree in which each part of a known class says its plain defaults too; classes that are not loaded stay as they are."""
    if isinstance(node, list):
        return [with_defaults(item) for item in node]
    if isinstance(node, dict):
        node = {key: value if key == "class_path" else with_defaults(value) for key, value in node.items()}
    name = node.get("class_path") if isinstance(node, dict) else node
    defaults = _defaults(name) if isinstance(name, str) else {}
    if not defaults:
        return node
    part = node if isinstance(node, dict) else {"class_path": name}
    values = part.get("init_args") or {}
    return {**part, "init_args": {**defaults, **values}} if isinstance(values, dict) else part


@functools.cache
def _defaults(name: str) -> dict[str, object]:
    """The plain defaults of a class: numbers, texts, null, and lists of these."""
    module, _, bare = name.rpartition(".")
    if module:
        cls = getattr(sys.modules.get(module), "__dict__", {}).get(bare)
    else:
        cls = next((c for c in known_classes() if c.__name__ == name), None)
    try:
        parameters = inspect.signature(cls).parameters.values() if inspect.isclass(cls) else ()
    except (TypeError, ValueError):  # a class of C
        return {}
    return {p.name: _as_written(p.default) for p in parameters if _is_plain(p.default)}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_written(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
