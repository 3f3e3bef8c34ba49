"""Short causal convolutions: each channel alone, over itself and the few positions before it.

Source   the gated one, a mixer of its own: Liquid AI 2025, "LFM2 Technical Report", arXiv:2511.23404; the plain one, which stands
         before recurrences: Gu & Dao 2023, "Mamba", arXiv:2312.00752, §3.4
Formula  conv(x)_t = Σ_{0 ≤ i < k} w_i ⊙ x_{t - i} (+ b), zeros before the first
         GatedShortConv:  [b c u] = W_in x;  y = W_out (c ⊙ conv(b ⊙ u)), no activation
How      k shifted multiply-adds, in float32 whatever the input's dtype; compiled they are one pass
Cost     ShortConv: k C weights and C biases; its FLOPs count as nothing, as all elementwise operations do.
         GatedShortConv: 4 D² + k D weights, 8 D² FLOPs a token
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, OutputLinear, SequenceMixer, Site, StackedLinear, wide
from blagpt_pl.nn.checks import at_least_one


class ShortConv(nn.Module):
    """A causal convolution of every channel alone.

    Args:
        channels: C.
        width: k, positions that one reads, its own included.
        bias: whether it has one.

    Raises:
        ValueError: a width or a number of channels below 1.
    """

    roles: ClassVar[dict[str, str]] = {"weight": "recurrence", "bias": "recurrence"}

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        at_least_one("ShortConv.channels", channels)
        bound = at_least_one("ShortConv.width", width) ** -0.5  # as torch starts a convolution
        self.width = width
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve a piece of a sequence.

        Args:
            x: (B, T, C).
            past: (B, k - 1, C), the inputs before these; zeros where there were none.

        Returns:
            The same shape and dtype as x, and the last k - 1 inputs, in float32 at least.
        """
        length, weight = x.shape[1], wide(self.weight)
        if past is None:
            past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2])
        padded = torch.cat((wide(past), wide(x)), dim=1)  # (B, k - 1 + T, C)
        y = padded[:, :length] * weight[:, 0]
        for i in range(1, self.width):
            y = torch.addcmul(y, padded[:, i : i + length], weight[:, i])
        if self.bias is not None:
            y = y + wide(self.bias)
        return y.to(x.dtype), padded[:, length:]


class GatedShortConv(SequenceMixer):
    """A short convolution between two gates, which are linear in the input: LFM2's mixer.

    Args:
        site: where it stands.
        width: k, positions that one reads, its own included.
        bias: whether the projections and the convolution have biases.
    """

    continues: ClassVar[bool] = True

    def __init__(self, site: Site, width: int = 3, bias: bool = False) -> None:
        super().__init__()
        at_least_one(f"layer {site.layer}: GatedShortConv.width", width)
        self.proj = StackedLinear(site.d_model, [site.d_model] * 3, bias)
        self.conv = ShortConv(site.d_model, width, bias)
        self.out = OutputLinear(site.d_model, site.d_model, bias)
        self.exempt = {"long memory": f"a layer reads the last {width} tokens"}

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        past = None if carry.states is None else carry.states.take()
        b, c, u = self.proj(x).chunk(3, dim=-1)  # (B, T, D) each
        y, last = self.conv(b * u, None if past is None else past[0])
        if carry.states is not None:
            carry.states.leave(last)
        return self.out(c * y)
