"""The channel mixer of TokenFormer: one Pattention from the stream to the stream.

Source   Wang et al. 2024, arXiv:2410.23168, section 3.2
Formula  y = Pattention(x): an MLP of one hidden layer, N wide, whose hidden numbers share one norm before the GELU
Cost     2 D N weights
"""

from typing import ClassVar

from torch import Tensor

from blagpt_pl.nn.base import Carry, ChannelMixer, Site
from blagpt_pl.nn.pattention import OutputPattention


class PattentionMLP(ChannelMixer):
    """Every position attends to learned tokens.

    Args:
        site: where it stands.
        n_tokens: N, parameter tokens.
        grown_from: how many there were when training began, if some have been added since.
    """

    sizes: ClassVar[dict[str, str]] = {"n_tokens": "width", "grown_from": "width"}

    def __init__(self, site: Site, n_tokens: int, grown_from: int | None = None) -> None:
        super().__init__()
        self.out = OutputPattention(site, site.d_model, site.d_model, n_tokens, grown_from=grown_from)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.out(x)
