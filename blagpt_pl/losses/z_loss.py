"""z-loss: keep the logarithm of the softmax's normaliser near zero.

Source   Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, §5; Wortsman et al. 2023, arXiv:2309.14322, §3.1.2
Formula  w · (1 / n) Σ_t (log Z_t)²,  Z_t = Σ_v exp(logits_tv), over the n targets that are not `IGNORE`, in float32
Differs  nothing; the logits are those of the next-token loss, soft-capped if the head caps them, and log Z may be negative
Cost     log Z is there already: a few operations a token; no parameter
"""

import math

import torch
from torch import Tensor

from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.term import BlockFactory, NormaliserTerm
from blagpt_pl.nn.base import Site


class ZLoss(NormaliserTerm):
    """w · (log Z)².

    Args:
        site: where the model's last block stands, not used.
        block: what the model repeats, not used.
        weight: w, how much of it is added to the next-token loss.

    Raises:
        ValueError: a weight that is not positive and finite.
    """

    name = "z_loss"

    def __init__(self, site: Site, block: BlockFactory, weight: float = 1e-4) -> None:
        super().__init__()
        if not 0 < weight < math.inf:
            raise ValueError(f"ZLoss.weight: {weight} (expected above 0; to do without it, leave ZLoss out)")
        self.weight = weight

    def of(self, log_z: Tensor, targets: Tensor) -> Tensor:
        return torch.where(targets == IGNORE, 0.0, self.weight * log_z.square())
