"""From features to logits: one linear map onto the vocabulary.

TiedHead    Press & Wolf 2016, arXiv:1608.05859: the map is the token embedding itself, one tensor with one optimizer entry
LinearHead  a map of its own
Cost        V · D multiply-adds a token either way; LinearHead adds V · D parameters
"""

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Head, Site


class TiedHead(Head):
    """logits = E · h with E the token embedding.

    Args:
        site: where it stands.
        embedding: the token embedding, (V, D).
    """

    def __init__(self, site: Site, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)


class LinearHead(Head):
    """logits = W · h (+ b).

    Args:
        site: where it stands.
        embedding: the token embedding, not used.
        bias: whether to learn one number for each entry of the vocabulary.
    """

    def __init__(self, site: Site, embedding: nn.Embedding, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(site.d_model, site.vocab_size, bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)
