"""From features to logits: one linear map onto the vocabulary, soft-capped where asked for.

TiedHead    Press & Wolf 2016, arXiv:1608.05859: the map is the token embedding itself, one tensor with one optimizer entry
LinearHead  a map of its own
softcap     Gemma Team 2024, arXiv:2408.00118: logits ← c · tanh(logits / c), c = 30 there. It is part of the head, so
            training, validation and generation see the same logits
Cost        V · D multiply-adds a token either way; LinearHead adds V · D parameters; softcap one tanh a logit
"""

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Head, LinearMap, Site
from blagpt_pl.nn.softcap import SoftCap

CAPPING = (nn.Identity, SoftCap)


def capping(softcap: float | None) -> nn.Module:
    """What the logits pass through last."""
    return nn.Identity() if softcap is None else SoftCap(softcap, "model.head.softcap")


class TiedHead(Head):
    """logits = E · h with E the token embedding.

    Args:
        site: where it stands.
        embedding: the token embedding, (V, D).
        softcap: c of the soft cap, in nats; no cap by default.
    """

    def __init__(self, site: Site, embedding: nn.Embedding, softcap: float | None = None) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.cap = capping(softcap)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap(F.linear(features, self.weight))

    def as_linear(self) -> LinearMap | None:
        return LinearMap(self.weight, None, getattr(self.cap, "cap", None)) if type(self.cap) in CAPPING else None


class LinearHead(Head):
    """logits = W · h (+ b).

    Args:
        site: where it stands.
        embedding: the token embedding, not used.
        bias: whether to learn one number for each entry of the vocabulary.
        softcap: c of the soft cap, in nats; no cap by default.
    """

    def __init__(self, site: Site, embedding: nn.Embedding, bias: bool = False, softcap: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(site.d_model, site.vocab_size, bias)
        self.cap = capping(softcap)

    def forward(self, features: Tensor) -> Tensor:
        return self.cap(self.linear(features))

    def as_linear(self) -> LinearMap | None:
        if type(self.linear) is not nn.Linear or type(self.cap) not in CAPPING:  # put there by somebody else
            return None
        return LinearMap(self.linear.weight, self.linear.bias, getattr(self.cap, "cap", None))
