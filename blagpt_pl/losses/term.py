"""What training minimises beside the next-token loss: terms that a model's `losses` socket takes, any number of them.

Formula  total = next-token loss + Σ terms, each term already multiplied by its weight
Kinds    LogitTerm reads the logits the loss reads, chunk by chunk; TrunkTerm reads the stream before the last block
Rule     a term is trained on and logged as train/<name>; it never enters val/loss
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, Part, Site

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


class TrunkTerm(LossTerm):
    """A term of the stream as it enters the model's last block."""

    def forward(self, model: nn.Module, trunk: Tensor, carry: Carry, targets: Tensor) -> dict[str, Tensor]:
        """Weighted scalars by name; whatever they are made of is differentiated here or stays in their graph.

        Args:
            model: a `LanguageModel` with `finish`, `readout` and `next_token`.
            trunk: (B, T, D), what enters the last block.
            carry: what travels beside it.
            targets: (B, T) int64.
        """
        raise NotImplementedError(f"{type(self).__name__} must return its weighted terms by name")


LossTermFactory = Callable[[Site, BlockFactory], LossTerm]
