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
from collections.abc import Callable
from functools import cache, partial
from inspect import isclass
from pathlib import Path
from pydoc import locate
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import pytest
import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of, model_part
from blagpt_pl.lab.parts import known_classes
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.lm import LanguageModel
from blagpt_pl.testing.promises import check_causal, check_responsive, influence
from blagpt_pl.testing.subject import random_tokens

ROOT = Path(__file__).resolve().parents[2]
TECHNIQUES = {path.stem: str(path) for path in sorted((ROOT / "configs" / "techniques").glob("*.yaml"))}
PAIRS = list(itertools.combinations(TECHNIQUES, 2))
FIRST = ("mla", "mla_lowrank", "gelu", "relu2", "untied")  # they name a part whose values others change
LENGTHS = 13, 23  # within the tiny context, and multiples of nothing


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


def merged(*names: str) -> dict:
    """The baseline under some overlays, tiny.

    Raises:
        ConfigError: the overlays do not combine in this order.
    """
    words = ["--config", str(ROOT / "configs" / "blagpt.yaml")]
    for name in names:
        words += ["--config", TECHNIQUES[name]]
    return tiny(layers_for(words).tree)


def parsed(tree: dict) -> LanguageModel:
    """The model as the command would build it."""
    torch.manual_seed(1)
    return model_of(Layers(tree))


def made(node: object, annotation: object) -> object:
    """A value as the parser would make it, in a thousandth of the time: parts by name, factories as partials."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(one for one in alternatives if one is not type(None))
    if isinstance(node, list):
        return [made(item, (get_args(kind) or (object,))[0]) for item in node]
    is_factory = get_origin(kind) is Callable
    target = get_args(kind)[1] if is_factory else kind
    path = node.get("class_path") if isinstance(node, dict) else node
    if not isclass(target) or not isinstance(path, str) or issubclass(target, str | int | float):
        return node
    cls = locate(path) if "." in path else next(c for c in known_classes() if c.__name__ == path)
    hints = get_type_hints(cls.__init__)
    values = node.get("init_args", {}) if isinstance(node, dict) else {}
    arguments = {key: made(value, hints.get(key, object)) for key, value in values.items()}
    return partial(cls, **arguments) if is_factory else cls(**arguments)


def built(tree: dict) -> LanguageModel:
    """The model, quickly.

    Raises:
        ConfigError: a part refuses its values.
    """
    torch.manual_seed(1)
    try:
        return made(model_part(tree), LanguageModel)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def fingerprint(model: LanguageModel) -> tuple:
    """What a setting may change: the parameters, their start, what is computed in training and in evaluation."""
    shapes = tuple(sorted(tuple(p.shape) for p in model.parameters()))
    start = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(model.vocab_size, (2, LENGTHS[0] + 1), generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.05)
        torch.manual_seed(3)
        total, _ = model.train().objective(tokens[:, :-1], tokens[:, 1:])
        logits = model.eval()(tokens[:, :-1])
    return shapes, start, total.item(), logits.double().abs().sum().item()


def train(model: LanguageModel, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(steps):
        tokens = random_tokens(model, 2, LENGTHS[1] + 1)
        optimizer.zero_grad()
        total, parts_ = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
        assert total.isfinite() and all(part.isfinite() for part in parts_.values())


def check_no_future(model: LanguageModel, length: int, training: bool, what: str) -> None:
    one, other = random_tokens(model, 2, length)
    other = torch.where(one == other, (one + 1) % model.vocab_size, other)
    reach = influence(model.train(training), one, other)
    check_causal(reach, f"{what} in {'train' if training else 'eval'} mode")
    check_responsive(reach, what)


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
