"""Next-token cross-entropy through Liger's fused kernel, an optional extra that needs a GPU and triton.

Source   Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", arXiv:2410.10989; the package
         `liger-kernel`, whose licence is BSD 2-clause
Differs  from `chunked`: its own choice of chunks; logits and their gradient in one kernel; the head's gradient adds up in
         float32 as here (`accum_dtype`). Terms of the logits other than z-loss, and several targets, are refused
Measure  is `chunked`'s
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from blagpt_pl.losses.chunked import Chunked, linear_of
from blagpt_pl.losses.next_token import IGNORE, NextToken
from blagpt_pl.losses.term import LogitTerm
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.nn.autocast import autocast_dtype, without_autocast


class Liger(NextToken):
    """Liger's fused linear cross-entropy.

    Raises:
        ValueError: the package is not installed; later, a head that is no linear map, a device that is no GPU, or a term
            that the kernel does not have.
    """

    def __init__(self, measured: NextToken | None = None) -> None:
        if find_spec("liger_kernel") is None:
            raise ValueError("model.loss: liger needs the package liger-kernel; fix: pip install 'blagpt-pl[liger]'")
        self.measured = measured or Chunked()

    def compiled(self, backend: str | Callable) -> "Liger":
        return Liger(self.measured.compiled(backend))

    def nats(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        return self.measured.nats(head, features, targets)

    def parts(
        self,
        head: nn.Module,
        features: Tensor,
        targets: Tensor,
        terms: Sequence[LogitTerm] = (),
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        linear = linear_of(head)
        if features.device.type != "cuda":
            raise ValueError(f"model.loss: liger runs on a GPU (found {features.device.type}); fix: chunked")
        if linear is None:
            raise ValueError(f"model.loss: liger takes heads that are a linear map (found {type(head).__name__})")
        if weights is not None or not all(isinstance(term, ZLoss) for term in terms):
            raise ValueError("model.loss: liger has z-loss alone, and one target a token; fix: chunked")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE,
            lse_square_scale=sum(term.weight for term in terms),
            softcap=linear.cap,
            return_z_loss=bool(terms),
            accum_dtype=torch.float32,
        )
        dtype = autocast_dtype(features.device) or features.dtype
        x, w = features.flatten(0, -2).to(dtype), linear.weight.to(dtype)
        with without_autocast(features.device):
            out = loss(w, x, targets.flatten(), None if linear.bias is None else linear.bias.to(dtype))
        if not terms:
            return out, out.detach()[None]
        return out.loss, torch.stack([out.loss - out.z_loss, out.z_loss]).detach()
