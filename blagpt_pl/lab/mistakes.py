"""Everything that is wrong with a configuration, found by holding it against the signatures of the classes it names.

From the outside in, without building anything: each value against the type of the argument it is for, each part against
the kind of its socket, each option against what its class takes. Whatever cannot be told by looking is left to others.
"""

import collections.abc
import datetime
import difflib
import functools
import importlib
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from jsonargparse._parameter_resolvers import ParamData, get_signature_parameters
from lightning.pytorch import Trainer

from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.callbacks.samples import Samples
from blagpt_pl.callbacks.step_time import StepTime
from blagpt_pl.data.module import TokenData
from blagpt_pl.lab.parts import known_classes
from blagpt_pl.lab.places import class_name
from blagpt_pl.lm import LanguageModel

SECTIONS = {"data": TokenData, "trainer": Trainer, "checkpoint": Checkpoint, "samples": Samples, "step_time": StepTime}
FIELDS = {"model": LanguageModel, "name": str, "logs": str, "seed_everything": int, "ckpt_path": str | None}
LINKED = {"context"}  # of a model: taken from data.context
UNKNOWN = "has no such option"
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Mistake:
    """One thing that is wrong.

    Attributes:
        path: the field, from the root.
        text: what was found and what was expected; empty where the value is merely of another type.
        at: the path whose line is to be mended, if it is another one.
    """

    path: str
    text: str = ""
    at: str = ""


@functools.cache
def options(cls: type, told: int = 0) -> dict[str, ParamData]:
    """What a class can be told in a configuration, after its first arguments, which it is told when it is built."""
    return {p.name: p for p in get_signature_parameters(cls, None)[told:]}


def _subclasses(kind: type) -> Iterator[type]:
    for cls in type.__subclasses__(kind):
        yield cls
        yield from _subclasses(cls)


def fitting(kind: type) -> list[str]:
    """Names of the parts that fit: those of the house, or all that are loaded where the house has none."""
    house = {c.__name__ for c in known_classes() if issubclass(c, kind) and c is not kind and not inspect.isabstract(c)}
    return sorted(house or {c.__name__ for c in _subclasses(kind) if not c.__name__.startswith("_")})


def _near(word: str, names: collections.abc.Iterable[str], what: str) -> str:
    names = list(names)
    close = difflib.get_close_matches(word, names, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; {what}: {', '.join(names[:12])}" if names else ""


def shown(value: object) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------- classes


def imported(path: str) -> tuple[object, str]:
    """What a dotted path names, or why it names nothing."""
    module, _, name = path.rpartition(".")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return None, f"cannot import {path!r} (no module {error.name!r} here or on the path)"
    except Exception as error:  # noqa: BLE001  whatever a stranger's module does when it is imported
        return (
            None,
            f"cannot import {path!r} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})",
        )
    found = getattr(loaded, name, None)
    if found is not None:
        return found, ""
    classes = [name for name, cls in vars(loaded).items() if inspect.isclass(cls)]
    return None, f"{module!r} has no {name!r}{_near(name, classes, 'it has')}"


def _part(path: str, value: str | dict, kind: type, told: int, is_factory: bool) -> list[Mistake]:
    """What is wrong with a part: a class name, or class_path and init_args."""
    given = value.get("class_path") if isinstance(value, dict) else value
    if given is None and not is_factory and not any(_subclasses(kind)):  # a mapping may stand for the class itself
        return _values(path, kind, value.get("init_args", value), 0)
    if not isinstance(given, str):
        return [Mistake(path, f"{shown(value)} names no class{_near('', fitting(kind), 'parts that fit')}")]
    if "." in given:
        cls, wrong = imported(given)
        if wrong:
            return [Mistake(path, wrong)]
    else:
        fits = [c for c in (*_subclasses(kind), kind) if c.__name__ == given]
        cls = next((c for c in fits if c in known_classes()), fits[0] if fits else None)  # as `parser.house_first`
        cls = cls or next((c for c in known_classes() if c.__name__ == given), None)
        if cls is None:
            return [Mistake(path, f"{given!r} is not a known class{_near(given, fitting(kind), 'parts that fit')}")]
    built = (
        cls if inspect.isclass(cls) else getattr(cls, "__annotations__", {}).get("return")
    )  # a function may build it
    if not inspect.isclass(built) or not issubclass(built, kind):
        return [
            Mistake(
                path, f"{given!r} does not fit here{_near(given.rpartition('.')[2], fitting(kind), 'parts that fit')}"
            )
        ]
    if not inspect.isclass(cls):
        return []
    values = value.get("init_args") if isinstance(value, dict) else None
    return _values(path, cls, values or {}, told)


def _values(path: str, cls: type, values: object, told: int) -> list[Mistake]:
    """What is wrong with the values that a class is given."""
    if not isinstance(values, dict):
        return [Mistake(path, f"{shown(values)} (expected options of {cls.__name__}, one a line)")]
    known = options(cls, told)
    is_open = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    mistakes = []
    for name, value in values.items():
        if name in known:
            mistakes += _value(f"{path}.{name}", value, known[name].annotation)
        elif not is_open:
            mistakes.append(Mistake(f"{path}.{name}", f"{cls.__name__} {UNKNOWN}{_near(name, known, 'options')}"))
    given = set(values) | (LINKED if issubclass(cls, LanguageModel) else set())
    missing = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n not in given]
    if not is_open:
        mistakes += [Mistake(f"{path}.{name}", f"has no value, and {cls.__name__} needs one", path) for name in missing]
    return mistakes


# ---------------------------------------------------------------------- values


def _alternatives(annotation: object) -> list[object]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [one for arg in typing.get_args(annotation) for one in _alternatives(arg)]
    return [annotation]


def _value(path: str, value: object, annotation: object) -> list[Mistake]:
    """What is wrong with a value, if no alternative of its type takes it: the alternative that got furthest tells."""
    alternatives = _alternatives(annotation)
    if {int, float} & set(alternatives) and not isinstance(value, dict):  # `float | Tensor`: text is no part there
        alternatives = [a for a in alternatives if a in WORDS or typing.get_origin(a)]
    tried = [_one(path, value, alternative) for alternative in alternatives]
    if not all(tried):
        return []
    told = [mistakes for mistakes in tried if mistakes[0].text]
    if told:
        return max(told, key=lambda mistakes: len(mistakes[0].path))
    expected = " or ".join(dict.fromkeys(_word(a) for a in alternatives))
    fix = ""
    if isinstance(value, float) and value.is_integer() and int in alternatives:
        fix = f"; fix: {int(value)}"
    elif isinstance(value, bool | int | float) and str in alternatives:
        fix = "; fix: in quotes"
    return [Mistake(path, f"{shown(value)} (expected {expected}){fix}")]


def _word(annotation: object) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return ", ".join(map(repr, typing.get_args(annotation)))
    if origin is tuple and ... not in typing.get_args(annotation):
        return f"a list of {len(typing.get_args(annotation))}"
    if origin is collections.abc.Callable:
        return _word(typing.get_args(annotation)[1])
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is dict or annotation is dict:
        return "a mapping"
    return f"a {annotation.__name__}" if isinstance(annotation, type) and origin is None else "a list"


def _one(path: str, value: object, annotation: object) -> list[Mistake]:
    """What is wrong with a value for one alternative of its type; nothing where that cannot be told."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    mismatch = [Mistake(path)]
    if annotation in WORDS:
        kinds = (int, float) if annotation is float else annotation
        fits = isinstance(value, kinds) and (annotation is bool or not isinstance(value, bool))
        return [] if fits else mismatch
    if origin is typing.Literal:
        return [] if value in args else mismatch
    if origin is dict or annotation is dict:
        return [] if isinstance(value, dict) else mismatch
    if origin is tuple and args and ... not in args:
        if not isinstance(value, list) or len(value) != len(args):
            return mismatch
        return [
            m for i, (item, arg) in enumerate(zip(value, args, strict=True)) for m in _value(f"{path}[{i}]", item, arg)
        ]
    if (
        inspect.isclass(origin)
        and origin is not collections.abc.Callable
        and issubclass(origin, collections.abc.Iterable)
    ):
        return (
            _elements(path, value, args[0])
            if isinstance(value, list) and args
            else []
            if isinstance(value, list)
            else mismatch
        )
    is_factory = origin is collections.abc.Callable
    kind = args[1] if is_factory and args else annotation
    if not inspect.isclass(kind) or kind is object:
        return []
    if issubclass(kind, pathlib.PurePath | datetime.timedelta):
        return [] if isinstance(value, str) else mismatch
    if not isinstance(value, str | dict):
        return (
            [Mistake(path, f"{shown(value)} is no part{_near('', fitting(kind), 'parts that fit')}")]
            if is_factory
            else mismatch
        )
    return _part(path, value, kind, len(args[0]) if is_factory and isinstance(args[0], list) else 0, is_factory)


def _elements(path: str, items: list, annotation: object) -> list[Mistake]:
    names = [class_name(item) for item in items]
    mistakes = []
    for i, (item, name) in enumerate(zip(items, names, strict=True)):
        unique = name is not None and re.fullmatch(r"\w+", name) and names.count(name) == 1
        mistakes += _value(f"{path}[{name if unique else i}]", item, annotation)
    return mistakes


# ---------------------------------------------------------------------- the whole


def mistakes_in(tree: dict) -> list[Mistake]:
    """Everything in a merged tree that the signatures refuse."""
    mistakes = []
    for key, value in tree.items():
        if key in SECTIONS:
            mistakes += _values(key, SECTIONS[key], value, 0)
        elif key in FIELDS:
            mistakes += _value(key, value, FIELDS[key])
        else:
            mistakes.append(Mistake(key, f"no such field{_near(key, [*FIELDS, *SECTIONS], 'fields')}"))
    missing = [key for key in ("model", "data") if key not in tree]
    return mistakes + [Mistake(key, "has no value; fix: name a complete --config first") for key in missing]
