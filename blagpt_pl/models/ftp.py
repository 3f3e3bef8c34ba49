"""FTP, future token prediction: every position foretells its next N tokens, through a small decoder that knows the past by it alone.

Source   Walker 2024, "Future Token Prediction: Causal Language Modelling with Per-Token Semantic State Vector for
         Multi-Token Prediction", arXiv:2410.18160
Formula  h = norm(blocks(E[x] (+ positions)))                             the encoder, causal, (B, T, D)
         m_t = reshape(W h_t, [P, D]),  W: D -> P D                       a pseudo-sequence of P vectors
         y_t = decoder([E[x_t], E[x_{t+1}], ..., E[x_{t+N-1}]] + slots; m_t)   for each t: N slots, causal among themselves, each
               block reading m_t by cross-attention; slots: one learned vector each
         total = Σ_{n=1..N} γ^{n-1} CE(head(norm(y_{t,n})), x_{t+n});  each a mean over the targets that the sequence has
How      the slots of all t are sequences of their own, (B T, N, D), cut from the embeddings without a copy (unfold). The features are
         the first slot: it needs no other, so that measuring and generating run the decoder over one slot a token. In training mode
         `forward` runs all N, so that dropout draws what it draws in the objective
Differs  the paper divides by Σ γ^{n-1}; here the next token's weight is 1, so that the numbers logged sum to the total. Adam does not
         notice. What the blocks are made of is said in the configuration; the decoder's are the encoder's with cross-attention.
         The encoder ends in a norm of its own. W has no bias
Cost     P D² for W, N D for the slots. In training a block of the decoder is N blocks of the encoder, in FLOPs and in activations, and
         the head is applied N times: a smaller `data.device_batch_size`. Measuring and generating: each block once a token
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.objective import Lesson
from blagpt_pl.losses.term import LossTermFactory, TrunkTerm
from blagpt_pl.nn.attention.cross import CrossFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site, StackedLinear, built
from blagpt_pl.nn.cross_block import CONTEXT, CrossBlock
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.token_model import TokenModel


def onwards(x: Tensor, n: int, beyond: int = 0) -> Tensor:
    """(B, T, ...) -> (B, T, n, ...), a view of a padded copy: at t, what stands at t ... t + n - 1.

    Args:
        x: numbers, or vectors.
        n: how many.
        beyond: what stands after the end.
    """
    return F.pad(x, [0, 0] * (x.ndim - 2) + [0, n - 1], value=beyond).unfold(1, n, 1).movedim(-1, 2)


class FTP(TokenModel):
    """Encoder, a pseudo-sequence for each position, decoder over the tokens that follow.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of both streams.
        n_layers: blocks of the encoder.
        n_decoder_layers: blocks of the decoder.
        future: N, tokens that each position predicts.
        pseudo: P, vectors that a position's state becomes. With one, cross-attention has nothing to choose from.
        gamma: γ; the n-th token's loss weighs γ^(n - 1).
        block: what is repeated, in the encoder and, around a cross-attention, in the decoder, whose context is `future`.
        cross: how the decoder reads the pseudo-sequence.
        norm: normalisation after the encoder, before each cross-attention, and after the decoder.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        positions: added to the encoder's token embeddings; none by default.
        losses: what training minimises beside, of the next token's logits; nothing by default.
        token_bias: whether a second embedding of a slot's own token is added to its features, before the head.
        dropout: probability of dropping an element of the embeddings, and of what enters the slots, in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile the model and its loss as one graph instead of block by block.

    Raises:
        ValueError: no future to weigh or one beyond the context, a weight that is none, or a term that predicts later tokens itself.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "n_layers": "layers",
        "n_decoder_layers": "layers",
        "vocab_size": "vocabulary",
        "context": "tokens",
        "future": "tokens",
    }

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        n_layers: int,
        n_decoder_layers: int,
        future: int,
        pseudo: int,
        gamma: float,
        block: BlockFactory,
        cross: CrossFactory,
        norm: NormFactory,
        head: HeadFactory,
        init: Init,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        positions: PositionsFactory | None = None,
        losses: list[LossTermFactory] | None = None,
        token_bias: bool = False,
        dropout: float = 0.0,
        compile: str | None = None,
        memory: MemoryPolicy | None = None,
        loss: LossName = "chunked",
        whole_graph: bool = False,
    ) -> None:
        super().__init__(vocab_size, context, optimizer, schedule, compile, loss, memory, whole_graph)
        if not 2 <= future <= context:
            raise ValueError(f"model.future: {future} (expected 2 to {context}, the context)")
        if not 0 < gamma <= 1:
            raise ValueError(f"model.gamma: {gamma} (expected above 0, and at most 1)")
        self.begin(d_model, dropout, n_layers=n_layers, n_decoder_layers=n_decoder_layers, pseudo=pseudo)
        self.future, self.pseudo = future, pseudo
        self.head_passes = future
        self.weights = [float(gamma) ** n for n in range(future)]
        count = n_layers + n_decoder_layers
        site = Site(d_model, count, 0, vocab_size, context)

        def in_slots(site: Site) -> CrossBlock:
            return CrossBlock(replace(site, context=future), block, cross, norm)

        self.positions = None if positions is None else positions(site)
        self.encoder = stack("model.block", block, site, range(n_layers))
        self.encoder_norm = built("model.norm", norm, d_model)
        self.expand = StackedLinear(d_model, [d_model] * pseudo, bias=False)
        self.slots = LearnedPositions(replace(site, context=future))
        self.decoder = stack("model.block", in_slots, site, range(n_layers, count))
        self.end(replace(site, layer=count - 1), in_slots, norm, head, init, losses, token_bias)
        if foretelling := [term.name for term in self.losses if isinstance(term, TrunkTerm)]:
            raise ValueError(
                f"model.losses: {foretelling[0]} reads the stream before a last block that predicts the next token alone, but FTP "
                "predicts later ones itself (expected terms of the logits); fix: leave it out, and set model.future"
            )

    def regions(self) -> Iterable[nn.Module]:
        return [*self.encoder, *self.decoder]

    def features(self, tokens: Tensor) -> Tensor:
        return self.foretold(tokens, self.future if self.training else 1)[:, :, 0]

    def lesson(self, tokens: Tensor, targets: Tensor) -> Lesson:
        """Features (B, T, N, D) and targets (B, T, N, N): slot n has a target in column n alone, if the sequence has it."""
        n = self.future
        own = torch.eye(n, dtype=torch.bool, device=targets.device)
        one_each = torch.where(own, onwards(targets, n, IGNORE)[..., None], IGNORE)
        names = [f"future_{i}" for i in range(2, n + 1)]
        return Lesson(self.foretold(tokens, n), one_each, self.weights, names)

    def foretold(self, tokens: Tensor, n: int) -> Tensor:
        """(B, T) -> (B, T, n, D): the features of the first n slots; what a slot beyond the end holds is of no meaning."""
        self.check_length(tokens)
        embedded = self.embedding(tokens)  # (B, T, D)
        states = self.encoded(embedded, tokens)
        context = self.expand(states).unflatten(-1, (self.pseudo, -1)).flatten(0, 1)  # (B T, P, D)
        inputs = onwards(tokens, n)  # (B, T, n)
        x = onwards(embedded, n) + self.slots(inputs)  # (B, T, n, D)
        x = self.drop(x).flatten(0, 1)  # (B T, n, D)
        carry = Carry(inputs.flatten(0, 1), x, {CONTEXT: context})  # all that the decoder knows
        return self.ended(through(self.decoder, x, carry).unflatten(0, tokens.shape), inputs)

    def encoded(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """The states h: embeddings (B, T, D) of the tokens (B, T) -> (B, T, D)."""
        x = embedded if self.positions is None else embedded + self.positions(tokens)
        x = self.drop(x)
        return self.encoder_norm(through(self.encoder, x, Carry(tokens, x)))
