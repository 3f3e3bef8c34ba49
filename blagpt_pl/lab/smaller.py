"""Smaller numbers for the sizes of a part: one rule for each thing that a size is measured in (`lab/sizes.py`).

context      48                              vocabulary   97               layers   2, others in proportion
pattern      each letter at most twice, in order
d_model      48; if the heads do not go into it evenly, 4 wide or wider, the first multiple from 32 on into which they do
heads        as they are; more than 16 divided by a common factor of those of the part
head         in proportion to d_model, or to the narrowest of the part if that would fall below 4; even
width        in proportion to d_model, even, at most 8 d_model
tokens       in proportion to the context, even, at least 2; only those that reach through the context do so afterwards
with strides: multiples of them, two at least where there is room, and distinct ones stay distinct
strides      as they are while the tokens fit so; else in proportion to the greatest of them, which becomes 24, or 12, 8, 4, 2
             until they fit; each is the next smaller divisor of that one

A size that is smaller already stays.
"""

import math
from collections.abc import Callable, Iterable
from fractions import Fraction

CONTEXT, VOCABULARY, LAYERS = 48, 97, 2
WIDTH, NARROWEST = 48, 32  # of the stream
MOST_HEADS, HEAD = 16, 4  # the latter is the narrowest
WIDEST = 8  # times the stream
STRIDES = (24, 12, 8, 4, 2)

Sizes = dict[str, int | list[int] | str]


def flat(values: Sizes) -> list[int]:
    """All numbers among some sizes, whether they stand alone or in lists."""
    return [n for value in values.values() for n in (value if isinstance(value, list) else [value])]


def refilled(values: Sizes, numbers: Iterable[int]) -> Sizes:
    """Some sizes with other numbers, which are in the order of `flat`."""
    left = iter(numbers)
    return {name: [next(left) for _ in v] if isinstance(v, list) else next(left) for name, v in values.items()}


def each(values: Sizes, rule: Callable[[int], int]) -> Sizes:
    """Some sizes under a rule for one number."""
    return refilled(values, map(rule, flat(values)))


def share(size: tuple[int, int]) -> Fraction:
    """What is left of a size, as it was and as it becomes; all of it where it is not known."""
    was, now = size
    return Fraction(now, was) if was else Fraction(1)


def even(number: Fraction) -> int:
    """The nearest even number."""
    return 2 * round(number / 2)


def fewer_heads(heads: Sizes) -> Sizes:
    """At most 16, divided by a common factor, if there is one that does it; else by the greatest."""
    common, most = math.gcd(*flat(heads)), max(flat(heads))
    factors = [f for f in range(1, common + 1) if common % f == 0 and most <= MOST_HEADS * f]
    return each(heads, lambda n: n // (factors[0] if factors else common))


def stream_width(d_model: int, heads: list[int]) -> int:
    """The width of the stream: of the configuration, if that is small enough, else one into which the heads go."""
    unit, least = 2 * math.lcm(*heads), HEAD * max(heads, default=1)
    first = -max(NARROWEST, least) // unit * -unit
    return min(d_model, WIDTH if WIDTH % unit == 0 and least <= WIDTH else first)


def shorter(length: int, context: int) -> int:
    """A length of text within a context of 48."""
    if length >= context:
        return CONTEXT
    return min(length, max(2, even(Fraction(length * CONTEXT, context))), CONTEXT - 2)


def shorter_in_steps(tokens: Sizes, strides: Sizes, context: int) -> Sizes:
    """Lengths, and the strides that divide them, for a context of 48; nothing where they cannot be made to fit."""
    lengths, steps = flat(tokens), flat(strides)
    if len(lengths) != len(steps):
        return {}  # the class has a word to say on that
    for new in [steps, *(smaller_strides(steps, greatest) for greatest in STRIDES if greatest < max(steps))]:
        if fitted := fitting(lengths, steps, new, context):
            return refilled(tokens, fitted) | refilled(strides, new)
    return {}


def smaller_strides(strides: list[int], greatest: int) -> list[int]:
    """Strides of which the greatest is another one: divisors of that, at most in proportion; none but 1 becomes 1."""
    divisors = [n for n in range(1, greatest + 1) if greatest % n == 0]
    share = Fraction(greatest, max(strides))
    return [max(n for n in divisors if n <= max(min(r, 2), r * share)) for r in strides]


def fitting(lengths: list[int], steps: list[int], new_steps: list[int], context: int) -> list[int] | None:
    """Lengths that are multiples of new steps within a context of 48, all distinct; None where they do not fit."""
    branches = sorted(set(zip(lengths, steps, new_steps, strict=True)))
    found: dict[tuple[int, int], int] = {}
    for new in set(new_steps):
        inner = [(w, r) for w, r, n in branches if n == new and w < context]
        through = [(w, r) for w, r, n in branches if n == new and w >= context]
        wanted, last = [], 0
        for w, _ in inner:  # distinct from below
            last = max(2 * new, last + new, round(Fraction(w * CONTEXT, context) / new) * new)
            wanted.append(last)
        last = -CONTEXT // new * -new  # the first that reaches through
        for key, want in reversed(list(zip(inner, wanted, strict=True))):  # and from above
            last = found[key] = min(want, (min(last, CONTEXT) - 1) // new * new, key[0] // new * new)
        found |= dict.fromkeys(through, -CONTEXT // new * -new)
        if last < 1 or len(through) > 1 or new > STRIDES[0]:
            return None
    return [found[key] for key in zip(lengths, steps, strict=True)]


def narrower(width: int, d_model: tuple[int, int]) -> int:
    """A width in proportion to that of the stream, as it was and as it becomes; 0 where it is not known."""
    was, now = d_model
    if width == was or now == was:
        return now if width == was else width
    return min(width, max(2, even(width * share(d_model))), WIDEST * now)


def narrower_heads(dims: Sizes, d_model: tuple[int, int]) -> Sizes:
    """The widths of a part's heads, all in one proportion."""
    least = min((n for n in flat(dims) if n >= HEAD), default=HEAD)
    by = max(share(d_model), Fraction(HEAD, least))
    return each(dims, lambda n: min(n, max(HEAD, even(n * by)))) if by < 1 else dims


def fewer_letters(pattern: str) -> str:
    """A word with each of its letters at most twice, in order."""
    return "".join(letter for i, letter in enumerate(pattern) if pattern[:i].count(letter) < 2)
