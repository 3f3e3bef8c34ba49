"""Next-token cross-entropy: the definition, all logits at once, and what every implementation of it offers.

Formula  loss = -(1 / n) Σ_t log softmax(head(h_t))[y_t] over the n targets that are not `IGNORE`, in float32
Several  with K targets a token, (..., K), and their weights w: Σ_k w_k · loss_k, each a mean over its own targets
Here     `Full`, the naive twin; `losses.chunked` never holds all logits; `losses.liger` calls Liger's kernel
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.term import LogitTerm
from blagpt_pl.nn.base import wide
from blagpt_pl.nn.compiled import compiled

IGNORE = -100  # a target that counts nowhere


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, V) logits and (N,) targets -> (N,) float32 nats; 0 where the target is `IGNORE`."""
    return F.cross_entropy(wide(logits), targets, ignore_index=IGNORE, reduction="none")


def summed(logits: Tensor, targets: Tensor, shares: Tensor, terms: Sequence[LogitTerm] = ()) -> Tensor:
    """Sums over rows, each target by its share: of the loss of each target, then of each term; (K + terms,).

    Args:
        logits: (n, V).
        targets: (n, K); a term reads the first.
        shares: (K,), what a target that counts is multiplied by.
        terms: of the logits.
    """
    logits = wide(logits)  # once for all
    shares = shares.to(logits.dtype)
    losses = [share * token_losses(logits, target).sum() for share, target in zip(shares, targets.T, strict=True)]
    return torch.stack([*losses, *(term(logits, targets[:, 0]).sum() for term in terms)])


def flat(features: Tensor, targets: Tensor, weights: Sequence[float] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(..., D) and (...), or (..., K) with weights -> (N, D), (N, K), n of the first target, and each target's share of it.

    The sum of all losses, each multiplied by its share, is n times what is minimised.
    """
    features = features.flatten(0, -2)
    targets = targets.flatten()[:, None] if weights is None else targets.flatten(0, -2)
    counts = (targets != IGNORE).sum(0)  # (K,)
    n = counts[0]
    if weights is None:
        return features, targets, n, torch.ones_like(counts, dtype=torch.float64)
    given = torch.stack([torch.full((), w, dtype=torch.float64, device=counts.device) for w in weights])
    return features, targets, n, given * n / counts.clamp(min=1)  # a target that counts nowhere adds nothing


class NextToken(ABC):
    """How the next-token loss is made.

    Every implementation gives the same numbers; they differ in memory and time. `rows` of the twin is compiled as one
    piece where the model is.
    """

    @abstractmethod
    def parts(
        self,
        head: nn.Module,
        features: Tensor,
        targets: Tensor,
        terms: Sequence[LogitTerm] = (),
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is minimised, and what it is the sum of.

        Args:
            head: maps (n, D) features to (n, V) logits; its parameters receive their gradients.
            features: (..., D), everything before the head.
            targets: (...) int64, already shifted, or (..., K) with `weights`; `IGNORE` counts nowhere.
            terms: of the logits, added to the loss.
            weights: of K targets a token.

        Returns:
            The scalar to differentiate; and the weighted mean of each target, then of each term, which no gradient flows
            through, (K + terms,).
        """

    @abstractmethod
    def nats(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        """Sum of the losses of all targets that count, in float64, not differentiated: what a ruler adds up."""

    @abstractmethod
    def compiled(self, backend: str | Callable) -> "NextToken":
        """The same, with its elementwise part compiled by a backend of torch.compile."""


class Full(NextToken):
    """All logits at once, differentiated by autograd: the naive twin of the others."""

    def __init__(self, rows: Callable = summed) -> None:
        self.rows = rows

    def parts(
        self,
        head: nn.Module,
        features: Tensor,
        targets: Tensor,
        terms: Sequence[LogitTerm] = (),
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        features, targets, n, shares = flat(features, targets, weights)
        means = self.rows(head(features), targets, shares, terms) / n
        return means.sum(), means.detach()

    @torch.no_grad()
    def nats(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        return token_losses(head(features.flatten(0, -2)), targets.flatten()).sum(dtype=torch.float64)

    def compiled(self, backend: str | Callable) -> "Full":
        return Full(compiled(self.rows, backend))


def full(head: nn.Module, features: Tensor, targets: Tensor, terms: Sequence[LogitTerm] = ()) -> Tensor:
    """What `Full` minimises."""
    return Full().parts(head, features, targets, terms)[0]
