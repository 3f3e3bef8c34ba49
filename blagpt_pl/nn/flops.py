"""What training costs in matrix products, convolutions and attention, counted while the model runs without its weights.

How      the objective and its backward pass run once, on a copy without weights (`nn.weightless`). Every operation that
         runs is counted by the rules of `nn.flop_rules` and put down to its module (`nn.flop_tally`): a multiply-add is
         two; what is elementwise, a reduction or a look-up is none. One without a rule is listed, never a silent zero
Words    a part with a method `flops_per_token(context)` that answers (as finished cores do) is counted by its word, not
         by what runs inside: each call costs the word a token, and twice that again in the backward pass. So does
         torch's scaled_dot_product_attention outside of cores: 2 (K + K') a pair of positions, half of them where causal
Differs  it runs eagerly, and on no device: what a module does on a GPU alone is not seen. What activation checkpointing
         computes again counts, as backward
Cost     one pass through the model's Python code: half a second for the baseline, and none of its memory
"""

from dataclasses import dataclass
from textwrap import shorten

import torch
from torch import nn

from blagpt_pl.nn.flop_tally import AttentionCalls, Tally
from blagpt_pl.nn.weightless import weightless


class CannotCount(ValueError):
    """A model that does not run without data, or cannot be copied; the message names the module and the operation."""


def told(error: Exception) -> str:
    """What an exception says, in one line."""
    return f"{type(error).__name__}: {shorten(str(error), 200)}"


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step, by the path of the module that did them ("" is the model itself, in no submodule).

    What a token costs is its share, rounded up where the total does not divide.

    Attributes:
        forward, backward: by path, in the model's order; a module that does none is left out.
        uncounted: how often each operation without a rule ran, by name; where not empty, the totals are lower bounds.
        tokens: of the step.
    """

    forward: dict[str, int]
    backward: dict[str, int]
    uncounted: dict[str, int]
    tokens: int

    @property
    def forward_per_token(self) -> int:
        """Of the forward pass alone."""
        return -(-sum(self.forward.values()) // self.tokens)

    @property
    def backward_per_token(self) -> int:
        """Of the backward pass alone."""
        return -(-sum(self.backward.values()) // self.tokens)

    @property
    def per_token(self) -> int:
        """Forward and backward."""
        return -(-(sum(self.forward.values()) + sum(self.backward.values())) // self.tokens)


def count_flops(model: nn.Module, context: int, batch: int = 1) -> Flops:
    """Count one training step, in training mode; dropout costs nothing, as all that is elementwise.

    Args:
        model: has `objective(tokens, targets)`, whose first result is differentiated; on any device, and left as it is.
        context: T, tokens of a sequence.
        batch: B, sequences.

    Raises:
        CannotCount: it reads the elements of a tensor, runs an operation that not every device has, or is sharded.
        ValueError: a part's `flops_per_token` says something that is no whole number.
    """
    with torch.inference_mode(False), torch.compiler.set_stance("force_eager"):  # gradients on, whatever the caller has
        try:
            copy = weightless(model).train()
        except Exception as error:
            fix = "count before the model is sharded"
            raise CannotCount(f"model: cannot be copied ({told(error)}); fix: {fix}") from error
        tally = Tally()
        for path, module in list(copy.named_modules())[1:]:
            tally.watch(path, module, batch, context)
        try:
            with torch.device("meta"), AttentionCalls(tally), tally:
                tokens = torch.zeros(batch, context, dtype=torch.int64)  # (B, T)
                total, _ = copy.objective(tokens, tokens)
                if total.requires_grad:
                    total.backward()
        except Exception as error:
            where = f"model{tally.place_of(error)}"
            raise CannotCount(f"{where}: does not run on tensors without elements ({told(error)})") from error
    paths = [path for path, _ in copy.named_modules()]
    forward, backward = ({p: n[p] for p in paths if n[p]} for n in (tally.forward, tally.backward))
    return Flops(forward, backward, dict(tally.uncounted), batch * context)
