"""The one ruler: mean next-token cross-entropy over exactly the configured tokens, and bits per byte beside it.

Formula  loss = Σ nats / Σ tokens;  perplexity = exp(loss);  bpb = Σ nats / (ln 2 · Σ bytes of the target tokens)
How      a torchmetrics metric: sums in float64 on each rank, added over ranks, so that neither the batch size nor the
         number of ranks enters the result
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class Ruler(Metric):
    """Adds up nats, tokens and bytes over an evaluation; exact over ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")  # nats, tokens, bytes
        self.add_state("unmeasured", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> "Ruler":
        """Follow the model to another device, never to another type, as a model of 16-bit weights would ask for."""

        def moved(sums: Tensor) -> Tensor:
            new = fn(sums)
            return new if new.dtype == sums.dtype else sums.to(new.device)

        return super()._apply(moved, exclude_state)

    def update(self, nats: Tensor, tokens: Tensor, n_bytes: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            nats: summed cross-entropy of the batch, float64.
            tokens: how many targets it counted.
            n_bytes: how many bytes of text those targets stand for; None or negative where that is not known.
        """
        known = torch.full_like(tokens, -1) if n_bytes is None else n_bytes.to(tokens.device)
        self.sums += torch.stack([nats.double(), tokens.double(), known.clamp(min=0).double()])
        self.unmeasured += known < 0

    def compute(self) -> dict[str, float]:
        """`loss` in nats a token, `perplexity`, `tokens`, and `bpb` where all bytes are known."""
        nats, tokens, n_bytes = self.sums.tolist()
        if not tokens:
            raise ValueError("evaluation: not a single target token; fix: data.val_tokens of at least 1")
        loss = nats / tokens
        result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}
        if n_bytes and not self.unmeasured:
            result["bpb"] = nats / (math.log(2) * n_bytes)
        return result
