"""What training minimises: the next-token loss and the terms of a model's `losses`, in one pass over the trunk.

Formula  total = next-token loss + Σ terms, each weighted; the terms of the logits are made in the chunks of the loss, those of
         the trunk after it, from the stream and the memo as they were before the last block
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from blagpt_pl.losses.next_token import chunked_parts
from blagpt_pl.losses.term import LogitTerm, TrunkTerm


def objective(model: nn.Module, summed: Callable, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to differentiate, and the numbers that it is the sum of: `loss`, and the terms by name.

    Args:
        model: a `LanguageModel`.
        summed: sums of one chunk, `next_token.summed` or its compiled form.
        tokens, targets: (B, T) int64.
    """
    on_trunk = [term for term in model.losses if isinstance(term, TrunkTerm)]
    on_logits = [term for term in model.losses if isinstance(term, LogitTerm)]
    if on_trunk:
        x, carry = model.trunk(tokens)
        features = model.finish(x, replace(carry, memo=dict(carry.memo)))  # the terms get the memo as it is here
    else:
        features = model.features(tokens)
    body = partial(summed, terms=on_logits) if on_logits else summed
    total, means = chunked_parts(model.head, features, targets, body=body)
    parts = dict(zip(("loss", *(term.name for term in on_logits)), means, strict=True))
    for term in on_trunk:
        extra, numbers = term(model, x, carry, targets)
        total = total + extra
        parts |= numbers
    return total, parts
