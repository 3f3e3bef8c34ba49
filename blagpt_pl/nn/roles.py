"""What each parameter of a model is, asked of the modules that hold it and never of its name.

A tensor that a table is looked up in is an `embedding`, also when a tied head multiplies by it; a matrix that belongs to
the head alone is a `head`; every other tensor of two or more dimensions is a `matrix`, the rest are `vector`s. A module
whose own parameters are something else says so in `roles`, name → role: those that drive a recurrence do.
"""

from torch import nn

from blagpt_pl.nn.base import Norm, StackedLinear

NORMS = (Norm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)  # ours, and torch's for parts of others


def roles_of(model: nn.Module, head: nn.Module) -> dict[str, str]:
    """The role of every distinct parameter, by its name.

    Args:
        model: the whole model.
        head: the part of it that maps features onto the vocabulary.
    """
    in_head = {id(p) for p in head.parameters()}
    kinds: dict[int, str] = {}
    for module in model.modules():
        said = getattr(module, "roles", {})
        for name, p in module.named_parameters(recurse=False):
            kind = said.get(name, "vector" if p.ndim < 2 else "head" if id(p) in in_head else "matrix")
            kinds[id(p)] = "embedding" if isinstance(module, nn.Embedding) else kinds.get(id(p), kind)
    return {name: kinds[id(p)] for name, p in model.named_parameters()}


def splits_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters that stack several maps, by name, with the rows of each map."""
    rows = {id(module.weight): module.rows for module in model.modules() if isinstance(module, StackedLinear)}
    return {name: rows[id(p)] for name, p in model.named_parameters() if id(p) in rows}


def blocks_of(model: nn.Module) -> dict[str, tuple[tuple[int, int], ...]]:
    """The parameters whose rows do not all act alone, by name: runs along dimension 0, (rows, rows of one block) each.

    The blocks of a projection to queries or keys are its heads (`StackedLinear`); the gain of a norm is one block.
    """
    blocks: dict[int, tuple[tuple[int, int], ...]] = {}
    for module in model.modules():
        if isinstance(module, StackedLinear) and max(module.heads) > 1:
            blocks[id(module.weight)] = tuple(zip(module.rows, module.heads, strict=True))
        elif isinstance(module, NORMS) and module._parameters.get("weight") is not None:
            blocks[id(module.weight)] = ((len(module.weight), len(module.weight)),)
    return {name: blocks[id(p)] for name, p in model.named_parameters() if id(p) in blocks}
