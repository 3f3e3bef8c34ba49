"""Every overlay in configs/techniques/ alone, and every pair of them, on the baseline at the tiny size of `blagpt check`.

Alone or together they build through the real parser, train two steps, look at no future (in train and in eval mode, at
lengths that are multiples of nothing), and change something: the parameters, their start, or what is computed. The pairs
that do not combine stand in docs/techniques/README.md with their reason, and exactly those are refused (or, if both set
one plain value, the later one is all there is).
"""

import copy
import itertools
import random
import re
from functools import cache
from pathlib import Path

import pytest
from overlaid import LENGTHS, TECHNIQUES, built, check_no_future, fingerprint, merged, parsed, train

from blagpt_pl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAIRS = list(itertools.combinations(TECHNIQUES, 2))
FIRST = ("mla", "mla_lowrank", "gelu", "relu2", "untied")  # they name a part whose values others change


@cache
def excluded() -> dict[frozenset[str], str]:
    """The pairs that the documentation says do not combine, and why: rows `| a, b | c, d | reason |`."""
    text = (ROOT / "docs" / "techniques" / "README.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \| (`[^|]*`) \| ([^|]+) \|$", text, re.MULTILINE)
    pairs = {}
    for left, right, reason in rows:
        for one, other in itertools.product(re.findall(r"`(\w+)`", left), re.findall(r"`(\w+)`", right)):
            if one != other:
                pairs[frozenset((one, other))] = reason
    return pairs


@cache
def alone(*names: str) -> tuple:
    """The fingerprint of a single overlay, or of none."""
    return fingerprint(built(merged(*names)))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_alone(name: str) -> None:
    assert alone(name) != alone(), f"{name}.yaml changes nothing"
    model = parsed(merged(name))
    assert fingerprint(copy.deepcopy(model)) == alone(name)  # `made` makes what the parser makes
    train(model)
    fingerprint(model)  # moves every parameter off its start
    for length in LENGTHS:
        for training in (True, False):
            check_no_future(model, length, training, name)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(pair: tuple[str, str]) -> None:
    models, refusals = [], []
    for names in (pair, pair[::-1]):
        try:
            models.append(built(merged(*names)))
        except ConfigError as error:
            refusals.append(str(error))
    found = [fingerprint(model) for model in models]
    reason = excluded().get(frozenset(pair))
    if reason is not None:  # plain values are not refused: the later one holds
        assert found in ([], [alone(pair[1]), alone(pair[0])]), f"{pair} combine, but README.md says: {reason}"
        return
    assert models, f"{' and '.join(pair)} do not combine: {refusals[0]}; a reason belongs in docs/techniques/README.md"
    assert len(set(found)) == 1, f"{pair}: the order of two files matters"
    for name in pair:
        assert found[0] != alone(name), f"{' and '.join(pair)}: one of them does nothing beside {name}"
    train(models[0])
    check_no_future(models[0], LENGTHS[0], True, "+".join(pair))


@pytest.mark.parametrize("seed", range(12))
def test_many(seed: int) -> None:
    """As many as go together, drawn at random: those that name another part first, as the README says."""
    names: list[str] = []
    for name in random.Random(seed).sample(list(TECHNIQUES), len(TECHNIQUES)):
        if not any(frozenset((name, other)) in excluded() for other in names):
            names.append(name)
    names.sort(key=lambda name: name not in FIRST)
    model = built(merged(*names))
    fingerprint(model)
    train(model)
    for training in (True, False):
        check_no_future(model, LENGTHS[1], training, "+".join(names))


def test_every_exclusion_names_overlays() -> None:
    for pair, reason in excluded().items():
        assert pair <= TECHNIQUES.keys(), f"docs/techniques/README.md excludes {sorted(pair)}: no such overlay"
        assert len(reason) > 10
