"""A stack whose blocks are of several kinds: a word with one letter a layer says which kind stands where."""

from collections.abc import Callable, Mapping


def check_letters(order: str, kinds: Mapping[str, str]) -> None:
    """Refuse a word that says no stack.

    Args:
        order: the word, `model.order`.
        kinds: what each letter stands for.

    Raises:
        ValueError: no letter, or an unknown one.
    """
    known = ", ".join(f"{letter} ({kind})" for letter, kind in kinds.items())
    if not order:
        raise ValueError(f"model.order: empty (expected a letter a layer: {known})")
    for layer, letter in enumerate(order):
        if letter not in kinds:
            raise ValueError(f"model.order: layer {layer} of {order!r} is {letter!r} (expected one of {known})")


def check_sockets(order: str, sockets: Mapping[str, tuple[str, Callable | None]]) -> None:
    """Refuse letters and sockets that do not go together.

    Args:
        order: the word, `model.order`.
        sockets: for each letter, the socket that builds its kind, and what it holds.

    Raises:
        ValueError: a letter whose socket is empty, or a socket that no letter asks for.
    """
    for letter, (socket, part) in sockets.items():
        if letter in order and part is None:
            raise ValueError(f"model.{socket}: empty, but model.order {order!r} has {letter!r} (expected a part)")
        if letter not in order and part is not None:
            raise ValueError(
                f"model.{socket}: no effect, since no layer of model.order {order!r} is {letter!r}; fix: null, or a layer"
            )
