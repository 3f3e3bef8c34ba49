"""Embeddings of what is no token: where one stands, and what stands before the first.

LearnedPositions  Radford et al. 2019 (GPT-2): one learned vector for each position, added to the token's
StartVector       one learned vector that stands before a sequence, as trainable padding does (Yu et al. 2023, arXiv:2305.07185)
Cost              context · D parameters, and D
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


class StartVector(nn.Module):
    """A learned vector before every sequence, which starts as a row of an embedding does.

    Args:
        width: of the sequence's vectors.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.empty(width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, D) -> (..., T + 1, D)."""
        return torch.cat((self.vector.to(x.dtype).expand(*x.shape[:-2], 1, -1), x), dim=-2)
