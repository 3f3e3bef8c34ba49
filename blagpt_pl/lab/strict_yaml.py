"""YAML 1.1, strictly: what a file could mean by mistake is an error that names file, line and column.

Differs from YAML 1.1 as PyYAML reads it
  refused   a key written twice, a list or mapping that contains itself, and every tag but those of plain data
            (`!!python/object`, `!!binary`, `!!set`, ...)
  number    1e-3 and 1e3 are floats
  text      dates, and 10:30:00, which would be a count of seconds; = too
As in YAML 1.1, `yes`, `no`, `on` and `off` are true or false, and 010 is 8; quotes make text of them.
Anchors, aliases and merge keys (`<<`) work.
"""

import re
from collections.abc import Callable

import yaml

from blagpt_pl.errors import ConfigError

_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_FLOAT = r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
_INT = r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|0[0-7_]*|[1-9][\d_]*)"


class _Strict(yaml.SafeLoader):
    """SafeLoader with the differences that the module names."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[str | None] = []  # anchors of the collections that are being read

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        if self.check_event(yaml.AliasEvent) and (event := self.peek_event()).anchor in self._open:
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor} stands inside itself", event.start_mark)
        return super().compose_node(parent, index)

    def _inside(self, anchor: str | None, compose: Callable[[str | None], yaml.Node]) -> yaml.Node:
        self._open.append(anchor)
        node = compose(anchor)
        self._open.pop()
        return node

    def compose_sequence_node(self, anchor: str | None) -> yaml.Node:
        return self._inside(anchor, super().compose_sequence_node)

    def compose_mapping_node(self, anchor: str | None) -> yaml.Node:
        node = self._inside(anchor, super().compose_mapping_node)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(
                    None, None, "a key is a list or a mapping (expected a name)", key.start_mark
                )
            if key.value in seen:
                problem = f"key {key.value!r} is written twice (first on line {seen[key.value]})"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return node


_REPLACED = {_TAG + name for name in ("float", "int", "timestamp", "value")}
_Strict.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Strict.add_implicit_resolver(_TAG + "float", re.compile(rf"^(?:{_FLOAT})$"), list("-+0123456789."))
_Strict.add_implicit_resolver(_TAG + "int", re.compile(rf"^(?:{_INT})$"), list("-+0123456789"))
_Strict.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag in {_TAG + n for n in _PLAIN}
}


def _strictly(text: str, origin: str, what: Callable[[_Strict], object]) -> object:
    try:
        return what(_Strict(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
        raise ConfigError(f"{where}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from None


def load_text(text: str, origin: str) -> object:
    """The value that a YAML text stands for.

    Args:
        text: YAML.
        origin: what to call the text in an error.

    Raises:
        ConfigError: not YAML, a repeated key, or a tag that is not plain data.
    """
    return _strictly(text, origin, _Strict.get_single_data)


def compose_text(text: str, origin: str) -> yaml.Node | None:
    """The nodes of a YAML text, which know their lines; None for an empty text."""
    return _strictly(text, origin, _Strict.get_single_node)


def load_mapping(text: str, origin: str) -> dict:
    """The mapping that a YAML text holds; an empty text is an empty mapping.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    value = load_text(text, origin)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{origin}: holds a {type(value).__name__} (expected `key: value` lines)")
    return value
