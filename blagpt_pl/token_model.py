"""What architectures have around their blocks: a table of tokens before them, a norm and a head after them.

A constructor calls `begin`, builds what lies between, and calls `end`. Random numbers are drawn in this order, and additions
draw apart and last: a run with them and one without, of one seed, start from the same weights.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from blagpt_pl.lm import LanguageModel
from blagpt_pl.losses.term import LossTermFactory, built_terms
from blagpt_pl.nn.base import HeadFactory, Init, NormFactory, Site, built
from blagpt_pl.nn.checks import at_least_one
from blagpt_pl.nn.dropout import dropout as dropped
from blagpt_pl.nn.stack import BlockFactory


class TokenModel(LanguageModel):
    """Embedding, whatever lies between, norm (and per-token bias), head."""

    @abstractmethod
    def regions(self) -> Iterable[nn.Module]:
        """The repeated pieces, which lie between."""

    def begin(self, width: int, dropout: float, /, **sizes: int) -> None:
        """Make the table of tokens.

        Args:
            width: of the table; the argument `d_model`, unless `sizes` names another.
            dropout: probability of dropping an element of the embeddings in training.
            sizes: other numbers of the model by their names, checked as the width is.

        Raises:
            ValueError: a size below 1, or a dropout that is no probability.
        """
        for name, size in {"vocab_size": self.vocab_size, "d_model": width, **sizes}.items():
            at_least_one(f"model.{name}", size)
        self.embedding = nn.Embedding(self.vocab_size, width)
        self.drop = dropped("model.dropout", dropout)

    def end(
        self,
        site: Site,
        block: BlockFactory,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        losses: Sequence[LossTermFactory] | None,
        token_bias: bool,
    ) -> None:
        """Make the norm, the head, the additions, and start all parameters.

        Args:
            site: where the last block stands, in the stream that the head reads.
            block: builds what could stand in the last block's place.
            norm, head, init: the parts.
            losses: terms of the objective.
            token_bias: whether a second embedding of the input token is added to the features.
        """
        self.norm = built("model.norm", norm, site.d_model)
        first = replace(site, layer=0)
        self.head = built("model.head", head, first, self.embedding)
        with torch.random.fork_rng(devices=[]):
            self.token_bias = nn.Embedding(self.vocab_size, site.d_model) if token_bias else None
            terms = built_terms(losses or [], site, block)
        del self.losses
        self.losses = nn.ModuleList(terms)
        init(self, first)

    def ended(self, x: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, D) as the last block leaves it -> features; tokens (B, T) are what the per-token bias reads."""
        x = self.norm(x)
        return x if self.token_bias is None else x + self.token_bias(tokens)

    def readout(self) -> Iterable[nn.Module]:
        return [m for m in (self.norm, self.token_bias, self.head) if m is not None]

    def check_length(self, tokens: Tensor) -> None:
        """Refuse what is longer than the context.

        Raises:
            ValueError: with the remedy.
        """
        if tokens.shape[1] > self.context:
            raise ValueError(
                f"tokens: {tokens.shape[1]} a sequence (context {self.context}); fix: data.context or shorter input"
            )
