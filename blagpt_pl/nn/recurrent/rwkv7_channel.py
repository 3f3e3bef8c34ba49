"""RWKV-7's channel mixer, and the token shift that both of its mixers begin with.

Source   Peng et al. 2025, "RWKV-7 Goose", arXiv:2503.14456, §4; the start of μ from the authors' training code
Formula  y = W_v relu(W_k (x + μ ⊙ (shift(x) - x)))², shift(x)_t = x_{t-1}, zeros before the first; no gate
Start    μ_i = 1 - (i / D)^((1 - l / L)^4) in layer l of L
Cost     2 ratio D² + D weights
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, ChannelMixer, OutputLinear, Site, wide
from blagpt_pl.nn.mlp import hidden_width
from blagpt_pl.nn.recurrent.rwkv7_init import OrthogonalLinear, mixing


def shifted(x: Tensor, carry: Carry) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What stands one place before: zeros before the first token.

    Args:
        x: (B, T, D).
        carry: with the state of whoever asks, where there are states: its last input, and what else it left.

    Returns:
        x one place later (B, T, D), the last input (B, D) in float32 at least, and what else was left.
    """
    past = None if carry.states is None else carry.states.take()
    last, *rest = (x.new_zeros(x.shape[0], x.shape[2]),) if past is None else past
    return torch.cat((last.to(x.dtype)[:, None], x[:, :-1]), dim=1), wide(x[:, -1]), tuple(rest)


class RWKV7ChannelMix(ChannelMixer):
    """RWKV-7's channel mixer: an MLP with a squared ReLU, of each input mixed with the one before it.

    Args:
        site: where it stands.
        ratio: hidden width over the stream's width.

    Raises:
        ValueError: a ratio that leaves no hidden number.
    """

    reads_before: ClassVar[int] = 1
    continues: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {"mix": "recurrence"}

    def __init__(self, site: Site, ratio: float = 4) -> None:
        super().__init__()
        hidden = hidden_width("RWKV7ChannelMix.ratio", site, ratio)
        self.mix = nn.Parameter(mixing(site, (1 - site.layer / site.n_layers) ** 4))
        self.up = OrthogonalLinear(site.d_model, hidden, 1.0)
        self.down = OutputLinear(hidden, site.d_model, bias=False)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        before, last, _ = shifted(x, carry)
        if carry.states is not None:
            carry.states.leave(last)
        return self.down(F.relu(self.up(x + (before - x) * self.mix)).square())
