"""What training minimises: the next-token loss and the terms of a model's `losses`, in one pass over the trunk.

Formula  total = next-token loss + Σ terms, each weighted; the terms of the logits are made in the chunks of the loss, those of
         the trunk after it, from the stream and the memo as they were before the last block
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from blagpt_pl.losses.chunked import learned, linear_of
from blagpt_pl.losses.next_token import NextToken
from blagpt_pl.losses.term import LogitTerm, TrunkTerm


class Lesson(NamedTuple):
    """What a model's head learns from in one pass.

    Attributes:
        features: (..., D).
        targets: (...) int64, or with weights (..., K); the next token is the first, wherever it counts.
        weights: of the K targets, that of the next token 1.
        names: of the targets after the first, in the log.
    """

    features: Tensor
    targets: Tensor
    weights: Sequence[float] | None = None
    names: Sequence[str] = ()


def objective(model: nn.Module, loss: NextToken, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to differentiate, and the numbers that it is the sum of: `loss`, and the terms by name.

    Args:
        model: a `LanguageModel`.
        loss: how the next-token loss is made.
        tokens, targets: (B, T) int64.
    """
    on_trunk = [term for term in model.losses if isinstance(term, TrunkTerm)]
    on_logits = [term for term in model.losses if isinstance(term, LogitTerm)]
    if on_trunk:
        x, carry = model.trunk(tokens)
        lesson = Lesson(
            model.finish(x, carry.but(memo=dict(carry.memo))), targets
        )  # the terms get the memo as it is here
    else:
        lesson = model.lesson(tokens, targets)
    total, means = loss.parts(model.head, lesson.features, lesson.targets, on_logits, lesson.weights)
    names = ("loss", *lesson.names, *(term.name for term in on_logits))
    parts = dict(zip(names, means, strict=True))
    for term in on_trunk:
        extra, numbers = term(model, x, carry, targets)
        total = total + extra
        parts |= numbers
    return total, parts


def measure(model: nn.Module, loss: NextToken, tokens: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the targets that count, in nats, float64; arguments as for `objective`."""
    return loss.nats(model.head, model.features(tokens), targets)


def untraceable(model: nn.Module) -> str | None:
    """What of a model's objective cannot be one graph, since it differentiates by autograd in the forward pass."""
    terms = [term.name for term in model.losses if isinstance(term, TrunkTerm)]
    if terms:
        return f"the term {terms[0]}"
    if learning := [term.name for term in model.losses if learned([term])]:
        return f"the term {learning[0]}, which learns,"
    return f"the head {type(model.head).__name__}" if linear_of(model.head) is None else None
