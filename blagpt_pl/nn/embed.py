"""Embeddings that say where a token stands.

LearnedPositions  Radford et al. 2019 (GPT-2): one learned vector for each position, added to the token's
Cost              context · D parameters
"""

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import Positions, Site


class LearnedPositions(Positions):
    """One learned vector for each position of the context.

    Args:
        site: where it stands; its context is the number of positions.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.table = nn.Embedding(site.context, site.d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(torch.arange(tokens.shape[-1], device=tokens.device))  # (T, D)
