"""Models under overlays at the tiny size of `blagpt check`: how they are built, trained and told apart."""

from collections.abc import Callable
from functools import partial
from inspect import isclass
from pydoc import locate
from types import UnionType
from typing import Union, get_args, get_origin, get_type_hints

import torch
from shipped import BASELINE, CONFIGS, MODELS

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of, model_part
from blagpt_pl.lab.parts import known_classes
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.lm import LanguageModel
from blagpt_pl.testing.promises import check_causal, check_responsive, influence
from blagpt_pl.testing.subject import random_tokens

TECHNIQUES = {path.stem: str(path) for path in sorted((CONFIGS / "techniques").glob("*.yaml"))}
LENGTHS = 13, 23  # within the tiny context, and multiples of nothing


def merged(*names: str, model: str | None = None) -> dict:
    """The baseline, or another model over it, under some overlays, tiny.

    Raises:
        ConfigError: the overlays do not combine in this order.
    """
    words = ["--config", str(BASELINE)]
    if model is not None:
        words += ["--config", str(MODELS[model])]
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
