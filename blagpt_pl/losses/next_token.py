"""Next-token cross-entropy that never holds the logits of more than one chunk of tokens.

Formula  loss = -(1 / n) Σ_t log softmax(head(h_t))[y_t] over the n targets that are not `IGNORE`, in float32
How      the tokens are cut into chunks; each chunk's logits, loss and gradients (with respect to its features and to the
         head's parameters) are made together in the forward pass and the logits let go. Backward only scales the stored
         gradients, so no matrix product is done twice. The head's gradients add up in float32.
Twin     `full`: all logits at once, plain autograd; the same value and gradients
Source   the idea: Wijmans et al. 2024 (Cut Cross-Entropy), arXiv:2411.09009; Hsu et al. 2024 (Liger), arXiv:2410.10989
Cost     logits of one chunk (chunk × V) instead of (B T) × V, and one float32 gradient of the head
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.stored import gradients, stored, unkept
from blagpt_pl.losses.term import LogitTerm
from blagpt_pl.nn.base import wide

IGNORE = -100  # a target that counts nowhere


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V) logits and (N,) targets -> (N,) float32 nats; 0 where the target is `IGNORE`."""
    return F.cross_entropy(wide(logits), targets, ignore_index=IGNORE, reduction="none")


def full(head: nn.Module, features: Tensor, targets: Tensor, terms: Iterable[LogitTerm] = ()) -> Tensor:
    """The naive twin of `chunked`: all logits at once."""
    return summed(head, features.flatten(0, -2), targets.flatten(), terms).sum() / (targets != IGNORE).sum()


def summed(head: nn.Module, features: Tensor, targets: Tensor, terms: Iterable[LogitTerm] = ()) -> Tensor:
    """Sums over one chunk, features (n, D) and targets (n,): of the loss, then of each term; (1 + terms,)."""
    logits = wide(head(features))  # once for all
    return torch.stack([token_losses(logits, targets).sum(), *(term(logits, targets).sum() for term in terms)])


def _by_chunk(
    head: nn.Module, features: Tensor, targets: Tensor, chunk: int, body: Callable, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The means of what `body` sums, and the gradients of their sum by the features and by the head's parameters."""
    n = (targets != IGNORE).sum()
    parts = torch.zeros((), dtype=torch.promote_types(features.dtype, torch.float32), device=n.device)
    grad_features = torch.empty_like(features)
    grads = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    for start in range(0, len(targets), chunk):
        piece = slice(start, start + chunk)
        x = features[piece].detach().requires_grad_()
        with torch.enable_grad():
            sums = body(head, unkept(x), targets[piece])
            gx, *gp = gradients(sums.sum(), [x, *parameters])
        parts = parts + sums.detach()
        grad_features[piece] = gx
        if grads:  # a frozen head has none
            torch._foreach_add_(grads, gp)
    torch._foreach_div_([grad_features, *grads], n)
    return parts / n, [grad_features, *grads]


def chunked(head: nn.Module, features: Tensor, targets: Tensor, chunk: int = 8192, body: Callable = summed) -> Tensor:
    """Mean next-token loss in nats, with at most `chunk` rows of logits alive.

    Args:
        head: maps (n, D) features to (n, V) logits; its own parameters receive their gradients.
        features: (..., D), everything before the head.
        targets: (...) int64, already shifted; `IGNORE` counts nowhere.
        chunk: tokens a chunk.
        body: the sums of one chunk, `summed` or its compiled form.

    Returns:
        A scalar; its gradients equal those of `full`.
    """
    return chunked_parts(head, features, targets, chunk, body)[0]


def chunked_parts(
    head: nn.Module, features: Tensor, targets: Tensor, chunk: int = 8192, body: Callable = summed
) -> tuple[Tensor, Tensor]:
    """As `chunked`, where `body` also sums terms of the logits.

    Returns:
        The sum of all means, to be minimised; and each mean, the next-token loss first, which no gradient flows through.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    features, targets = features.flatten(0, -2), targets.flatten()
    make = partial(_by_chunk, head, features, targets, chunk, body, parameters)
    return stored(make, [features, *parameters])


@torch.no_grad()
def total_nats(head: nn.Module, features: Tensor, targets: Tensor, chunk: int = 8192) -> Tensor:
    """Sum of the losses of all targets that count, in float64: what a ruler adds up.

    Args:
        head, features, targets, chunk: as for `chunked`.
    """
    pieces = zip(features.flatten(0, -2).split(chunk), targets.flatten().split(chunk), strict=True)
    return torch.stack([token_losses(head(f), t).sum(dtype=torch.float64) for f, t in pieces]).sum()
