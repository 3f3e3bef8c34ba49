"""Any configuration at a tiny size: the same parts in the same sockets, with numbers that a CPU trains in seconds.

What shrinks is what the classes say of themselves (`lab/sizes.py`), by the rules of `lab/smaller.py`, and `data.context`; a
class that says nothing keeps its values. Ratios are ratios, a model is not compiled, and starts without the file of a larger one.
"""

import contextlib
import copy
import traceback
from dataclasses import dataclass

import torch

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import model_of
from blagpt_pl.lab.places import class_name
from blagpt_pl.lab.sizes import class_of, measured, own_sizes, parts_in
from blagpt_pl.lab.smaller import (
    CONTEXT,
    LAYERS,
    VOCABULARY,
    Sizes,
    each,
    fewer_heads,
    fewer_letters,
    flat,
    narrower,
    narrower_heads,
    refilled,
    share,
    shorter,
    shorter_in_steps,
    stream_width,
)
from blagpt_pl.lab.without_donor import without_donor
from blagpt_pl.lm import LanguageModel


@dataclass(frozen=True)
class Scale:
    """What all sizes of a configuration go by.

    Attributes:
        d_model: width of the stream, as it was and as it becomes; 0 where the model does not say it.
        n_layers: blocks of its deepest stack, likewise.
        context: tokens, as they were.
    """

    d_model: tuple[int, int]
    n_layers: tuple[int, int]
    context: int

    def of(self, part: object) -> Sizes:
        """The sizes of a part, tiny; those that stay are left out."""
        before = measured(part)
        after: Sizes = {}
        for measure, sizes in before.items():
            match measure:
                case "width":
                    after |= apart(sizes, each(sizes, lambda n: narrower(n, self.d_model)), self.d_model[0])
                case "head":
                    after |= narrower_heads(sizes, self.d_model)
                case "heads":
                    after |= fewer_heads(sizes)
                case "layers":
                    after |= each(sizes, lambda n: min(n, max(1, round(n * share(self.n_layers)))))
                case "pattern":
                    after |= {name: fewer_letters(word) for name, word in sizes.items()}
                case "vocabulary":
                    after |= each(sizes, lambda n: min(n, VOCABULARY))
                case "tokens" if self.context > CONTEXT and "strides" in before:
                    after |= shorter_in_steps(sizes, before["strides"], self.context)
                case "tokens" if self.context > CONTEXT:
                    after |= each(sizes, lambda n: shorter(n, self.context))
        return {name: after[name] for name, size in together(before).items() if after.get(name, size) != size}


def apart(before: Sizes, after: Sizes, d_model: int) -> Sizes:
    """Widths of a part that differed still do: of two that became one, the lesser is in proportion to the greater.

    Args:
        before, after: the widths, as they were and as they became.
        d_model: the stream's, as it was: what goes with it stays.
    """
    sizes, found, greater = dict(zip(flat(before), flat(after), strict=True)), {}, None
    for was in sorted(sizes, reverse=True):
        now = sizes[was]
        if greater is not None and now >= found[greater] and was != d_model:
            now = found[greater] * was // greater
            now = max(1, now - now % 2)
        found[was], greater = now, was
    return refilled(after, (found[was] for was in flat(before)))


def together(measures: dict[str, Sizes]) -> Sizes:
    """A part's sizes by their names alone."""
    return {name: size for sizes in measures.values() for name, size in sizes.items()}


def scale_of(tree: dict) -> Scale:
    """The sizes of a model, as they are and as they become."""
    model = measured(tree["model"])
    d_model = next(iter(flat(model.get("width", {}))), 0)
    n_layers = max(flat(model.get("layers", {})), default=0)  # of the deepest of its stacks
    all_heads = [heads for part in parts_in(tree["model"]) if (heads := measured(part).get("heads"))]
    width = stream_width(d_model, [n for heads in all_heads for n in flat(fewer_heads(heads))])
    return Scale((d_model, width), (n_layers, min(n_layers, LAYERS)), tree["data"]["context"])


def shrunk(node: object, scale: Scale) -> object:
    """A node of a tree with all parts in it tiny."""
    if isinstance(node, list):
        return [shrunk(item, scale) for item in node]
    if isinstance(node, dict):
        below = {key: value if key == "class_path" else shrunk(value, scale) for key, value in node.items()}
        small = scale.of(node) if "class_path" in node else {}
        return {**below, "init_args": {**(below.get("init_args") or {}), **small}} if small else below
    small = scale.of(node) if isinstance(node, str) else {}
    return {"class_path": node, "init_args": small} if small else node


def tiny(tree: dict) -> dict:
    """A configuration with the same sockets at a tiny size; the one that is given stays as it is.

    Args:
        tree: all layers merged, as `layers_for` lets them through.

    Raises:
        ConfigError: the `sizes` of a class are malformed.
    """
    tree = copy.deepcopy(tree)
    model = shrunk(tree["model"], scale_of(tree))
    return {**tree, "model": eager(model), "data": {**tree["data"], "context": min(tree["data"]["context"], CONTEXT)}}


def eager(model: object) -> object:
    """A model that is not compiled, without the memory policy that is the compiler's, and with weights of no file."""
    model = without_donor(model)
    values = (model.get("init_args") or {}) if isinstance(model, dict) else {}
    off = {name: None for name in ("compile", "memory") if name in values}
    if class_name(values.get("memory")) != "Budget":
        off.pop("memory", None)
    return {**model, "init_args": {**values, **off}} if off else model


def what_shrank(tree: dict, small: dict) -> str:
    """What `tiny` made of a configuration, in one line: `d_model 768→48, n_layers 12→2`; empty if nothing."""
    sizes = [
        (name, size, together(measured(after))[name])
        for before, after in zip(parts_in(eager(tree["model"])), parts_in(small["model"]), strict=True)
        for name, size in together(measured(before)).items()
    ]
    own = len(together(measured(tree["model"])))
    sizes.insert(own, ("context", tree["data"]["context"], small["data"]["context"]))
    return ", ".join(dict.fromkeys(f"{name} {old}→{new}" for name, old, new in sizes if old != new))


# ---------------------------------------------------------------------- to a model


def tiny_model(layers: Layers) -> LanguageModel:
    """The tiny model of a configuration that also builds at its full size, which is tried without memory first.

    Args:
        layers: what has been said.

    Raises:
        ConfigError: the configuration is wrong as it is, or a part refuses to be tiny: then with what can be done.
    """
    with contextlib.suppress(RuntimeError, TypeError), torch.device("meta"):  # a part may want its numbers
        model_of(layers)
    small = tiny(layers.tree)
    try:
        return model_of(layers, small)
    except ConfigError as error:
        raise ConfigError(f"{error}; {_how_to_mend(error, layers.tree, small)}") from error


def _how_to_mend(error: ConfigError, tree: dict, small: dict) -> str:
    classes = [cls for part in parts_in(tree["model"]) if (cls := class_of(part)) is not None]
    silent = [cls for cls in classes if not cls.__module__.startswith(("blagpt_pl.", "torch.")) and not own_sizes(cls)]
    who = _refusing(error, classes)
    names = [who] if who in silent else silent
    says = " or ".join(dict.fromkeys(f"`sizes` on {cls.__module__}.{cls.__name__}" for cls in names))
    what = f"{who.__name__} refuses" if who else "that is"
    return f"{what} the tiny size ({what_shrank(tree, small)}); fix: --full-size{f', or {says}' if says else ''}"


def _refusing(error: BaseException, classes: list[type]) -> type | None:
    """The class whose method raised what led to an error, if it is one of these."""
    found, seen = None, set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            cls = type(frame.f_locals.get("self"))
            found = cls if cls in classes else found
        error = error.__cause__
    return found
