"""A model from configuration layers alone: no trainer, no data, and no memory either where the caller takes that away.

What `fit` refuses because of a field's name or a value's type is refused here in the same words, in whatever section it
stands; so is what a part of the model says of its values. What only a trainer or a data source can say is not asked.
"""

import copy
import functools
from collections.abc import Iterable

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import parts
from blagpt_pl.lab.explain import all_mistakes, explained, needs_base, refusals
from blagpt_pl.lab.layers import Layers, from_arguments
from blagpt_pl.lab.parser import FriendlyParser
from blagpt_pl.lab.rules import check_tree
from blagpt_pl.lm import LanguageModel


def layers_for(argv: Iterable[str]) -> Layers:
    """The layers that a command line names, `--config FILE` and `--key value`, if nothing is wrong with them.

    Raises:
        ConfigError: a word, a file or a field that `fit` would refuse, or a help that is not given here.
    """
    parts.import_all()
    layers = from_arguments(argv)
    if layers.rest:
        raise ConfigError(f"{layers.rest[0]}: no such help here; fix: blagpt fit {layers.rest[0]}")
    if not layers.tree:
        raise ConfigError("no configuration is named; fix: name a file, such as --config configs/blagpt.yaml")
    if needs_base(layers.tree):
        raise ConfigError("model: no layer names its class; fix: name a complete --config first")
    with explained(layers):
        check_tree(layers.tree)
    if told := all_mistakes(layers):
        raise ConfigError(told)
    return layers


@functools.cache
def _parser() -> FriendlyParser:
    parts.import_all()
    parser = FriendlyParser()
    parser.add_subclass_arguments(LanguageModel, "model", required=True)
    return parser


def model_part(tree: dict) -> dict:
    """The model's class and its values, the context among them: that of the data, as in a run; nothing is shared."""
    model = copy.deepcopy(tree["model"])  # jsonargparse parses lists in place
    model = {"class_path": model} if isinstance(model, str) else model
    return {**model, "init_args": {**(model.get("init_args") or {}), "context": tree["data"]["context"]}}


def model_of(layers: Layers, tree: dict | None = None) -> LanguageModel:
    """Build the model; seed before, or call it within `torch.device("meta")` or a `FakeTensorMode`, as it is needed.

    Args:
        layers: what has been said, and where: an error names its file and line.
        tree: what is to be built, if not exactly what has been said, such as `tiny(layers.tree)`.

    Raises:
        ConfigError: a value of another type than its argument's, or one that a part refuses.
    """
    with explained(layers), refusals():
        parser = _parser()
        settings = parser.parse_object({"model": model_part(layers.tree if tree is None else tree)})
        return parser.instantiate(settings).model
