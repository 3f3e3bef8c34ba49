"""What is wrong with a configuration, in one to three lines: the field, what was found, the nearest valid names, the file.

jsonargparse stops at the first mistake, names only the innermost key and lists every type it tried. So its complaint is only
the occasion: the merged tree is compared again with the signatures that it configures (`mistakes`), which gives the whole
path of every mistake and the line to mend. Where that finds nothing, jsonargparse has the word.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from blagpt_pl.errors import ConfigError, UserError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.mistakes import mistakes_in
from blagpt_pl.lab.parser import Complaint


def needs_base(tree: dict) -> bool:
    """Whether a merged tree is but a difference: it names no model, or only some of its values."""
    model = tree.get("model", {})
    return isinstance(model, dict) and "class_path" not in model


def explain(complaint: str, layers: Layers) -> str:
    """One to three lines for jsonargparse's complaint about the merged layers."""
    asked = next((word for word in layers.rest if ".help" in word), None)
    if asked and ".help" in complaint:
        name = complaint.split()[-1]
        unknown = "no such help; fix: name --config FILE or --model CLASS before it, or --help-all"
        return f"{asked}: {unknown if 'unrecognized' in complaint else f'{name!r} is not a known class'}"
    return all_mistakes(layers) or _in_its_words(complaint, layers)


def all_mistakes(layers: Layers) -> str:
    """One to three lines for what is wrong with the merged layers, as their signatures tell; nothing where they do not."""
    mistakes = mistakes_in(layers.tree)
    lines = [f"{m.path}: {m.text}{layers.where(m.at or m.path)}" for m in mistakes[:3]]
    if len(mistakes) > 3:
        lines[2:] = [f"and {len(mistakes) - 2} more"]
    return "\n".join(lines)


@contextmanager
def explained(layers: Layers) -> Iterator[None]:
    """Whatever is refused within, by a parser or by a part, is a ConfigError that says where it stands in the layers."""
    try:
        yield
    except Complaint as complaint:
        raise ConfigError(explain(str(complaint), layers)) from None
    except ConfigError as error:
        field = str(error).partition(":")[0]
        where = layers.where(field) if re.fullmatch(r"[\w.]+", field) else ""
        raise ConfigError(f"{error}{where}") from error.__cause__


@contextmanager
def refusals() -> Iterator[None]:
    """A ValueError within, by which a part says what is wrong with its values, is an error of the user's."""
    try:
        yield
    except ValueError as error:
        cause = error if isinstance(error, UserError) else why(error)
        raise cause if isinstance(cause, UserError) else ConfigError(str(cause).splitlines()[0]) from error


def _in_its_words(complaint: str, layers: Layers) -> str:
    """jsonargparse's own words, on one line."""
    key = re.search(r"(?:key|ption|rgument) [\"']([\w.]+)[\"']", complaint)
    where = layers.where(key[1]) if key else ""
    words = " ".join(complaint.split())
    return (words if len(words) <= 300 else words[:297] + "...") + where


def why(error: BaseException) -> BaseException:
    """The error that jsonargparse wrapped when it built something: the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
