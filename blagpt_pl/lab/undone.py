"""No layer silently undone: what one layer set, a later one may say anew, but not drop by the way.

    said anew     a plain value (number, text, true, false, null, a list of these) by any layer; a part, or an element
                  of a list, by a flag, which takes with it what the layer that named it said of it
    dropped       the rest: a part named by two files with different classes, a value below a part that is replaced (the
                  new part may have a value of that name, but that is another), an element appended to a list that is
                  assigned whole, an element removed that comes back

The first file is the base, there to be differed from: what becomes of its values is not watched, nor are they when a layer
that replaces a part says them again below it. Nor are those of a file that names another class for the whole model, which is
the base of the layers after it; that it is this class is watched. A layer is watched key by key, so it may not undo itself either.
"""

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.places import class_name, same_class
from blagpt_pl.lab.said import Reader, Said, is_flag, reach, shown, what_is

MODEL = ("model",)
_DOES = {"named": "names another", "set": "sets", "listed": "assigns all of", "added": "adds", "removed": "removes"}


class Watch:
    """Everything that the layers said and that still holds."""

    def __init__(self) -> None:
        self.said: list[Said] = []

    def see(self, key: str, value: object, before: dict, after: dict, source: str, is_base: bool = False) -> None:
        """Take note of one key of a layer, just merged.

        Args:
            key, value: what the layer says.
            before, after: the merged tree without and with it.
            source: the layer: a file, or a flag with its dashes.
            is_base: whether the layer may be differed from at will.

        Raises:
            ConfigError: something that a layer said is dropped.
        """
        new = list(Reader(before, after, source).key(key, value))
        renamed = [
            n
            for n in new
            if n.verb == "named" and not any(same_class(what_is(node), n.value) for node in reach(before, n.path))
        ]
        kept = []
        watched = [] if is_base else [n for n in new if not _restated(n, renamed, before)]
        if MODEL in [n.path for n in renamed] and not is_flag(source):
            watched = [n for n in watched if n.path == MODEL]
        for one in [*self.said, *watched]:
            if one.holds(after):
                kept.append(one)
                continue
            others = [n for n in new if n is not one]
            replaced = [n for n in renamed if n.path == one.path[: len(n.path)] and n.path != one.path]
            if replaced and one in self.said and not is_flag(source):  # what it says below is of another part
                raise ConfigError(_dropped(one, replaced, source))
            if not (_anew(one, others) or self._taken_along(one, others)):
                raise ConfigError(_dropped(one, others, source))
        self.said = kept

    def remover(self, name: str, wanted: str, source: str) -> str:
        """Who removed an element of that class from the list of that name; nothing if nobody is known to have."""
        for one in reversed(self.said):
            if one.verb == "removed" and one.path[-2:] == (name, f"[{class_name(wanted)}]"):
                return _who(one, source)
        return ""

    def _taken_along(self, one: Said, new: list[Said]) -> bool:
        """Whether a flag replaces the very part of which a layer said this when it named it."""
        return any(
            part.layer == one.layer and part.path == one.path[: len(part.path)] and part.path != one.path
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
        and (one.plain or n.by_flag or (one.verb == "removed" and n.layer == one.layer))
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
    if cause.verb == "listed":
        name, sign = cause.owner[-1], "=" if is_flag(source) else ":"
        hint = f", or change the list by {name}+{sign} (append), .+{name}{sign} (prepend), {name}-{sign} (remove)"
    return f"{_DOES[cause.verb]} {shown(cause.owner)}, which {undoes}; fix: leave one of them out{hint}"


def _who(one: Said, source: str) -> str:
    return "the same file" if one.source == source and not one.by_flag else one.source
