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
Refused are what a layer would undo of an earlier one by the way (`lab/undone.py`), and a file that can be no difference:
one that changes nothing, that is named twice, or that is a complete configuration of its own.
Two names are the same class if they are equal, or if one of them is bare and the other is that name in the house, in torch
or in Lightning: `AdamW` over `torch.optim.AdamW` keeps its values, `RMSNorm` over `my_ideas.RMSNorm` replaces it.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.config_files import read_file
from blagpt_pl.lab.defaults import with_defaults
from blagpt_pl.lab.places import PART_KEYS, Place, class_name, places_in, same_place, split
from blagpt_pl.lab.strict_yaml import compose_text, load_mapping, load_text
from blagpt_pl.lab.trees import NoElement, alike, put
from blagpt_pl.lab.undone import Watch

COMMAND_LINE = "on the command line"
PLAIN_TEXT = ("name", "logs", "ckpt_path")  # flags whose value is text, also where it looks like a number
_MARK = yaml.Mark("", 0, 0, 0, None, None)


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


def is_complete(said: dict) -> bool:
    """Whether what a file says can stand alone: it names a model's class and a source of data, as every base does."""
    tree: dict = {}
    for key, value in said.items():
        try:
            put(tree, key, value)
        except ConfigError:  # it reaches into a list that another file has
            continue
    data = tree.get("data")
    return class_name(tree.get("model")) is not None and isinstance(data, dict) and data.get("source") is not None


@dataclass
class Layers:
    """The merged tree, the flags that are not layers, and where each layer speaks of what.

    Attributes:
        tree: all layers merged.
        rest: flags passed on.
        places: (path, `FILE:LINE` or `on the command line`) of everything that is said, in order.
        files: the files that have been merged, and whether each is complete; the first is the base.
        watch: sees to it that no layer is silently undone.
    """

    tree: dict = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    places: list[tuple[Place, str]] = field(default_factory=list)
    files: dict[str, bool] = field(default_factory=dict)
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
        """Merge a file over the tree.

        Raises:
            ConfigError: it cannot be read or followed, undoes what an earlier layer said, or is no difference to them.
        """
        text = read_file(path)
        said = load_mapping(text, path)
        if any(Path(path).resolve() == Path(file).resolve() for file in self.files):
            raise ConfigError(f"{path}: is named twice; fix: leave one of them out")
        complete = is_complete(said)
        if complete and self.files:
            mixed = next((file for file, whole in self.files.items() if whole), next(iter(self.files)))
            raise ConfigError(
                f"{path}: is a complete configuration, which would be mixed with what {mixed} says; "
                "fix: name it first, and no other complete one"
            )
        before = dict(self.tree)
        for key, value in said.items():
            try:
                if key in PART_KEYS:
                    raise ConfigError(f"{key}: stands at the top (expected inside a part, such as model)")
                self._put(key, value, path)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
        if self.files and alike(with_defaults(before), with_defaults(self.tree)):
            why = "changes nothing here: all that it says is so already" if said else "says nothing"
            raise ConfigError(f"{path}: {why}; fix: leave it out")
        self.files[path] = complete
        self.places += [(place, f"in {path}:{line}") for place, line in places_in(compose_text(text, path))]

    def _put(self, key: object, value: object, source: str) -> None:
        before = dict(self.tree)
        try:
            put(self.tree, key, value)
        except NoElement as error:
            who = self.watch.remover(error.name, error.wanted, source)
            raise ConfigError(f"{error}; {who} removed it" if who else str(error)) from None
        self.watch.see(key, value, before, self.tree, source, is_base=not source.startswith("--") and not self.files)

    def add_flag(self, flag: str, text: str) -> None:
        """Merge a flag over the tree.

        Raises:
            ConfigError: it cannot be read or followed, or undoes what an earlier layer said.
        """
        value = flag_value(text, flag)
        try:
            self._put(flag, value, f"--{flag}")
        except ConfigError as error:
            said = str(error)
            raise ConfigError(f"--{said}" if said.startswith(f"{flag}: ") else f"--{flag}: {said}") from None
        node = yaml.MappingNode("", [(yaml.ScalarNode("", flag, _MARK), yaml.ScalarNode("", text, _MARK))])
        if isinstance(value, dict | list):
            node.value[0] = (node.value[0][0], compose_text(text, f"--{flag}"))
        self.places += [(place, COMMAND_LINE) for place, _ in places_in(node)]


Below = Callable[[list[tuple[str, str]]], tuple[str, dict] | None]


def from_arguments(argv: Iterable[str], passed_on: Iterable[str] = (), below: Below | None = None) -> Layers:
    """Merge the layers that a command line names, left to right.

    Args:
        argv: what stands after the command: `--config FILE`, `--a.b value`, `--a.b=value`, `--a.b+=value`,
            `--a.+b=value`, `--a.b-=Class`.
        passed_on: flags that are not layers.
        below: takes the flags and their texts and returns what lies below all of them, if anything: a name and a tree.

    Raises:
        ConfigError: a flag without a value, a word that belongs to no flag, or a layer that cannot be read.
    """
    layers = Layers()
    said, layers.rest = _flags(list(argv), passed_on)
    base = below(said) if below else None
    if base:
        layers.files[base[0]], layers.tree = True, base[1]
    for flag, text in said:
        if flag == "config":
            layers.add_file(text)
        else:
            layers.add_flag(flag, text)
    return layers


def _flags(words: list[str], passed_on: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """The flags that are layers, each with its text, and the words that are passed on."""
    said, rest = [], []
    while words:
        word = words.pop(0)
        if not word.startswith("--") and word.partition("=")[0] != "-c":
            raise ConfigError(f"{word!r}: belongs to no flag (expected --config FILE or --key value)")
        flag, equals, text = word.lstrip("-").partition("=")
        if flag in passed_on or flag == "help" or flag.endswith(".help"):
            rest.append(word)
            if flag.endswith(".help") and not equals and words and not words[0].startswith("-"):
                rest.append(words.pop(0))
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{flag}: has no value (expected --{flag} VALUE or --{flag}=VALUE)")
            text = words.pop(0)
        said.append(("config" if flag == "c" else flag, text))
    return said, rest
