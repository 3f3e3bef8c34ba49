"""What training minimises beside the next-token loss: terms that a model's `losses` socket takes, any number of them.

Formula  total = next-token loss + Σ terms, each term already multiplied by its weight
Kinds    LogitTerm reads the logits the loss reads, chunk by chunk (NormaliserTerm their log Z alone); TrunkTerm reads the
         stream before the last block
Rule     a term is trained on and logged as train/<name>; it never enters val/loss
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, Part, Site, built, wide

BlockFactory = Callable[[Site], Part]


class LossTerm(nn.Module):
    """A term of the objective.

    Attributes:
        name: its name in the log.
        head_passes: how many more times than the next-token loss it applies the head, for counting FLOPs.
    """

    name: str
    head_passes: int = 0

    def regions(self) -> Iterable[nn.Module]:
        """Repeated pieces of its own that are compiled one by one."""
        return ()


class LogitTerm(LossTerm):
    """A term of the logits, made in chunks with the next-token loss: no logits are kept for it."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(n, V) logits and (n,) targets -> (n,), weighted; its mean over the targets that count is the term."""
        raise NotImplementedError(f"{type(self).__name__} must return one number a token, (n, V) -> (n,)")


class NormaliserTerm(LogitTerm):
    """A term of log Z alone, the logarithm of the softmax's normaliser, which the next-token loss has made already."""

    def of(self, log_z: Tensor, targets: Tensor) -> Tensor:
        """(n,) log Z and (n,) targets -> (n,), weighted."""
        raise NotImplementedError(f"{type(self).__name__} must return one number a token, (n,) -> (n,)")

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self.of(wide(logits).logsumexp(-1), targets)


class TrunkTerm(LossTerm):
    """A term of the stream as it enters the model's last block."""

    def forward(
        self, model: nn.Module, trunk: Tensor, carry: Carry, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted scalar to differentiate, and the plain numbers it is the sum of, by name.

        Args:
            model: a `LanguageModel` with `finish`, `readout` and `next_token`.
            trunk: what enters the last block, in that block's layout; (B, T, D) in most models.
            carry: what travels beside it, as it was before the last block ran.
            targets: (B, T) int64.
        """
        raise NotImplementedError(f"{type(self).__name__} must return its weighted sum, and its parts by name")


LossTermFactory = Callable[[Site, BlockFactory], LossTerm]


def built_terms(factories: Sequence[LossTermFactory], site: Site, block: BlockFactory) -> list[LossTerm]:
    """Build the terms of a model.

    Args:
        factories: what its `losses` socket holds.
        site: where its last block stands.
        block: what it repeats.

    Raises:
        ValueError: a part that is no term, or two terms of one name, of which the log could show only one.
    """
    terms = [built(f"model.losses[{i}]", factory, site, block) for i, factory in enumerate(factories)]
    for i, term in enumerate(terms):
        if not isinstance(term, LogitTerm | TrunkTerm):
            raise ValueError(f"model.losses[{i}]: {type(term).__name__} is no loss term (LogitTerm or TrunkTerm)")  # noqa: TRY004
    name, times = Counter(term.name for term in terms).most_common(1)[0] if terms else ("", 0)
    if times > 1:
        raise ValueError(
            f"model.losses: {times} terms named {name} (expected one); fix: leave one, with their joint weight"
        )
    return terms
