"""What one token of training costs in matrix products and attention, counted from the modules themselves.

Formula  6 for each weight of a matrix product (2 forward, 4 backward), the head's once for each time it is applied, and 3 times
         what each core reads in a forward pass; a multiply-add counts as two
Differs  norms, activations and embeddings are not counted
"""

from collections.abc import Mapping

from torch import nn

from blagpt_pl.nn.base import Core


def training_flops(model: nn.Module, head: nn.Module, head_passes: int, roles: Mapping[str, str], context: int) -> int:
    """FLOPs a token, forward and backward.

    Args:
        model: the whole model.
        head: the part of it that maps features onto the vocabulary.
        head_passes: how often it is applied.
        roles: the role of each parameter, by name (`nn.roles`).
        context: tokens of a sequence.
    """
    products = sum(p.numel() for name, p in model.named_parameters() if roles[name] == "matrix")
    products += head_passes * sum(p.numel() for p in head.parameters() if p.ndim > 1)
    reading = sum(core.flops_per_token(context) for core in model.modules() if isinstance(core, Core))
    return 6 * products + 3 * reading
