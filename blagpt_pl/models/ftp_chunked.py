"""Chunked future token prediction: an encoder over all tokens, and a decoder over chunks of N that reads the chunk before.

Source   the model that BlaGPT (2025-02) calls FTP: after Walker 2024, arXiv:2410.18160, "heavily modified" by its own word
Formula  h = norm(blocks(E[x] (+ positions)))                             the encoder, (B, T, D)
         g_c = [h_{(c-1)N}, ..., h_{cN-1}],  g_0 = [h_0, ..., h_0]        what chunk c knows of the past
         y_c = decoder([E[x_{cN}], ..., E[x_{cN+N-1}]] + slots + norm(reshape(W mean(g_c), [N, D])); g_c)   causal among the N slots, each block
               reading g_c by cross-attention; slots: one learned vector each
         features at cN + j = norm(y_{c,j}), which predict x_{cN+j+1}
Differs  the original's encoder read both ways inside each chunk, and state 0 stands for a chunk before the first: the first N
         predictions saw the tokens they predicted. Here the encoder is causal, and state 0 has seen x_0 alone. Its weights γ were computed
         and never used: every token is predicted once, so they are not here, nor its map to a pseudo-sequence, which nothing read
         (7.1 M parameters). From the paper: see ftp.py, which is it. W has no bias, for the slots are one
         What W makes is normalised, by a gain that starts at 0: by itself it grows ahead of the embeddings that it is added to, and
         after 200 steps of a tiny model on characters the loss is still the unigram model's, 3.13 nats instead of 2.7
Cost     N D² for W, N D for the slots, D for the gain; the blocks' own, each once a token, and a cross-attention over N in the decoder's
Length   one that is no multiple of N ends in a chunk that is cut off after it was computed
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.lm import OptimizerFactory, ScheduleFactory
from blagpt_pl.losses.choice import LossName
from blagpt_pl.losses.term import LossTermFactory
from blagpt_pl.nn.attention.cross import CrossFactory
from blagpt_pl.nn.base import Carry, HeadFactory, Init, NormFactory, PositionsFactory, Site, StackedLinear, built
from blagpt_pl.nn.cross_block import CONTEXT, CrossBlock
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.memory import MemoryPolicy
from blagpt_pl.nn.stack import BlockFactory, stack, through
from blagpt_pl.token_model import TokenModel


class ChunkedFTP(TokenModel):
    """Encoder over the sequence, decoder over each chunk with the states of the chunk before.

    Args:
        vocab_size: V, rows of the embedding, padding included.
        context: T, the longest sequence, in tokens.
        d_model: D, width of both streams.
        n_layers: blocks of the encoder.
        n_decoder_layers: blocks of the decoder.
        chunk: N, tokens of a chunk.
        block: what is repeated, in the encoder and, around a cross-attention, in the decoder, whose context is `chunk`.
        cross: how the decoder reads the states of the chunk before.
        norm: normalisation after the encoder, of what W makes, before each cross-attention, and after the decoder.
        head: from features to logits.
        init: how the parameters start.
        optimizer: builds the optimizer from parameter groups.
        schedule: builds the schedule from the number of steps of the run.
        positions: added to the encoder's token embeddings; none by default.
        losses: what training minimises beside the next-token loss; nothing by default.
        token_bias: whether a second embedding of the input token is added to the features, before the head.
        dropout: probability of dropping an element of the embeddings, and of what enters the slots, in training.
        compile: backend of torch.compile for the blocks and the loss, or None to run eagerly.
        memory: what the blocks recompute instead of keeping it; nothing by default.
        loss: how the next-token loss is made: chunked, full (its naive twin) or liger.
        whole_graph: compile trunk and loss as one graph instead of block by block.

    Raises:
        ValueError: a chunk of one token, among which none attends, or one that leaves no other beside it in the context, a norm
            without a gain.
    """

    sizes: ClassVar[dict[str, str]] = {
        "d_model": "width",
        "n_layers": "layers",
        "n_decoder_layers": "layers",
        "vocab_size": "vocabulary",
        "context": "tokens",
    }

    def __init__(
        self,
        vocab_size: int,
        context: int,
        d_model: int,
        n_layers: int,
        n_decoder_layers: int,
        chunk: int,
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
        if not 2 <= chunk < context:
            raise ValueError(f"model.chunk: {chunk} (expected 2 or more, and less than the context of {context})")
        self.begin(d_model, dropout, n_layers=n_layers, n_decoder_layers=n_decoder_layers)
        self.chunk = chunk
        count = n_layers + n_decoder_layers
        site = Site(d_model, count, 0, vocab_size, context)

        def in_chunks(site: Site) -> CrossBlock:
            return CrossBlock(replace(site, context=chunk), block, cross, norm)

        self.positions = None if positions is None else positions(site)
        self.encoder = stack("model.block", block, site, range(n_layers))
        self.encoder_norm = built("model.norm", norm, d_model)
        self.spread = StackedLinear(d_model, [d_model] * chunk, bias=False)
        self.spread_norm = built("model.norm", norm, d_model)
        if getattr(self.spread_norm, "weight", None) is None:
            raise ValueError(
                f"model.norm: {type(self.spread_norm).__name__} has no gain that what a chunk's states are spread by could "
                "start at zero with; fix: a norm that learns a gain, such as RMSNorm"
            )
        nn.init.zeros_(self.spread_norm.weight)  # before `init`, which may have weights of a file
        self.slots = LearnedPositions(replace(site, context=chunk))
        self.decoder = stack("model.block", in_chunks, site, range(n_layers, count))
        self.end(replace(site, layer=count - 1), in_chunks, norm, head, init, losses, token_bias)

    def regions(self) -> Iterable[nn.Module]:
        return [*self.encoder, *self.decoder]

    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        """(B, T) -> the decoder's stream (B C, N, D), every chunk a sequence; the memo holds `tokens` as they were given."""
        self.check_length(tokens)
        n, short = self.chunk, -tokens.shape[1] % self.chunk
        embedded = self.embedding(tokens)  # (B, T, D)
        context = self.chunks_before(self.encoded(embedded, tokens))  # (B, C, N, D)
        inputs = F.pad(tokens, (0, short)).unflatten(1, (-1, n))  # (B, C, N)
        x = F.pad(embedded, (0, 0, 0, short)).unflatten(1, (-1, n))  # (B, C, N, D)
        x = x + self.slots(inputs) + self.spread_norm(self.spread(context.mean(2)).unflatten(-1, (n, -1)))
        x = self.drop(x).flatten(0, 1)  # (B C, N, D)
        carry = Carry(inputs.flatten(0, 1), x, {CONTEXT: context.flatten(0, 1), "tokens": tokens})
        return through(self.decoder[:-1], x, carry), carry

    def encoded(self, embedded: Tensor, tokens: Tensor) -> Tensor:
        """The states h: embeddings (B, T, D) of the tokens (B, T) -> (B, T, D)."""
        x = embedded if self.positions is None else embedded + self.positions(tokens)
        x = self.drop(x)
        return self.encoder_norm(through(self.encoder, x, Carry(tokens, x)))

    def chunks_before(self, states: Tensor) -> Tensor:
        """(B, T, D) -> (B, C, N, D): for each chunk the states of the one before; for the first, state 0 in their place."""
        n = self.chunk
        length = states.shape[1] + -states.shape[1] % n  # C N; the last chunk's own states are read by none
        return torch.cat((states[:, :1].expand(-1, n, -1), states), dim=1)[:, :length].unflatten(1, (-1, n))

    def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
        last = self.decoder[-1] if block is None else block
        tokens = carry.memo["tokens"]  # (B, T)
        y = last(x, carry).unflatten(0, (len(tokens), -1)).flatten(1, 2)  # (B, C N, D)
        return self.ended(y[:, : tokens.shape[1]], tokens)
