"""How RWKV-7 starts: every map orthogonal or zero, every vector by its channel and its layer.

Source   Peng et al. 2025, "RWKV-7 Goose", arXiv:2503.14456, and the authors' training code (RWKV-LM, RWKV-v7/train_temp)
Formula  maps into the stream 0; other maps orthogonal of gain 1, of keys 0.1; embedding U(±1e-4); head orthogonal of gain
         0.5 sqrt(V / D), 0.5 where V ≤ D; what a part starts itself (LowRank, μ, w_0 ...) stays
Differs  a table that is embedding and head at once is none of the authors' models. It starts as the head does, at half the gain:
         at the first step the stream still is the token's embedding, of unit variance behind the norm, and each token's own logit is
         sqrt(D) |E_t| = gain sqrt(D) (V > D); with 0.5 at D = 768 it is 13.9, and the first loss is ln V + 3, with 0.25 ln V + 0.05.
         The one layer of L = 1 counts as the first of several, where the authors' code divides by L - 1
Cost     a QR decomposition of every map, some seconds at 124 M parameters
"""

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import Head, Init, Site, StackedLinear, WritesStream
from blagpt_pl.nn.block import Branch

SMALL = 1e-4  # of an embedding that a norm follows


class OrthogonalLinear(nn.Linear):
    """A linear map without bias that starts orthogonal, and at a size of its own where the model's init is `RWKV7Init`.

    Args:
        d_in, d_out: widths.
        gain: its singular values at the start.
    """

    def __init__(self, d_in: int, d_out: int, gain: float) -> None:
        self.gain = gain
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight, self.gain)


def mixing(site: Site, exponent: float) -> Tensor:
    """(D,): how much of each channel's input is that of the token before: 1 - (i / D)^exponent."""
    return 1 - (torch.arange(site.d_model) / site.d_model) ** exponent


def decays(site: Site, head_dim: int) -> Tensor:
    """(D,): w_0, which grows with the channel, later ones steeper in later layers, and bends within each head."""
    depth = site.layer / max(1, site.n_layers - 1)
    return -5.5 + 6 * torch.linspace(0, 1, site.d_model) ** (1 + depth**0.3) + 2.5 * bends(site.d_model, head_dim)


def bends(width: int, head_dim: int) -> Tensor:
    """(D,): from -1 to 1 over each head, as z |z|."""
    z = torch.linspace(-1, 1, head_dim)
    return (z * z.abs()).repeat(width // head_dim)


class RWKV7Init(Init):
    """The start of RWKV-7's training code: orthogonal maps, zero outputs, a small embedding, a head of gain 0.5 sqrt(V / D)."""

    def __call__(self, model: nn.Module, site: Site) -> None:
        normed = [module for module in model.modules() if isinstance(module, Branch) and module.ends_in_norm]
        behind_a_norm = {module for branch in normed for module in branch.part.modules()}  # see `GPT2Init`
        for module in model.modules():
            if isinstance(module, WritesStream):
                module.start_output(site.d_model**-0.5 if module in behind_a_norm else 0.0)
            elif isinstance(module, OrthogonalLinear):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -SMALL, SMALL)
            elif isinstance(module, nn.Linear):
                for one in module.weight.split(
                    module.rows if isinstance(module, StackedLinear) else len(module.weight)
                ):
                    nn.init.orthogonal_(one)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for branch in normed:
            branch.start_at_zero()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        for head in (module for module in model.modules() if isinstance(module, Head)):
            linear = head.as_linear()
            if linear is not None:
                gain = 0.25 if id(linear.weight) in tables else 0.5
                nn.init.orthogonal_(linear.weight, gain * max(1, site.vocab_size / site.d_model) ** 0.5)
