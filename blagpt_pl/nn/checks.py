"""Checks of plain numbers that a configuration gives, so that a wrong one is told by its name and not by a NaN."""

import math


def positive(socket: str, value: float, such_as: str) -> float:
    """A number above 0.

    Args:
        socket: where it is set.
        value: what was found.
        such_as: what would have worked, and what to do without it.

    Raises:
        ValueError: it is 0, negative, infinite or no number.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{socket}: {value} (expected a positive number, such as {such_as})")
    return float(value)


def not_negative(socket: str, value: float, such_as: str) -> float:
    """A number of 0 or above.

    Args:
        socket, value, such_as: as for `positive`.

    Raises:
        ValueError: it is negative, infinite or no number.
    """
    if not 0 <= value < math.inf:
        raise ValueError(f"{socket}: {value} (expected 0 or a positive number, such as {such_as})")
    return float(value)


def probability(socket: str, value: float) -> float:
    """A probability of dropping that leaves something.

    Raises:
        ValueError: it is no probability, or drops everything.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{socket}: {value} (expected 0 or more, and below 1)")
    return float(value)


def at_least_one(socket: str, value: int) -> int:
    """A count.

    Raises:
        ValueError: it is below 1.
    """
    if value < 1:
        raise ValueError(f"{socket}: {value} (expected 1 or more)")
    return value
