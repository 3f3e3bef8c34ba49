"""QK-norm: normalise every query and key head before they meet.

Source   Henry et al. 2020, arXiv:2010.04245; in this form Qwen3, arXiv:2505.09388
Formula  q ← norm_q(q), k ← norm_k(k) over the head's width, one gain of K numbers for all query heads, one for all key heads
Differs  stands before RoPE in the list of edits, as in Qwen3; nanochat has it after, OLMo2 over all heads at once
Cost     2 K parameters a layer
"""

from typing import ClassVar

from torch import Tensor

from blagpt_pl.nn.base import Carry, HeadEdit, Heads, NormFactory, built


class QKNorm(HeadEdit):
    """Normalise queries and keys, head by head.

    Args:
        heads: the attention's heads.
        norm: the normalisation.
    """

    continues: ClassVar[bool] = True

    def __init__(self, heads: Heads, norm: NormFactory) -> None:
        super().__init__()
        self.q = built("QKNorm.norm", norm, heads.dim)
        self.k = built("QKNorm.norm", norm, heads.dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(q), self.k(k), v
