"""Channel mixers: two linear maps around a nonlinearity, plain or gated.

MLP       W2 · act(W1 x)                     Vaswani et al. 2017, arXiv:1706.03762
GatedMLP  Wd · (act(Wg x) ⊙ Wu x)            Shazeer 2020, arXiv:2002.05202: SwiGLU with SiLU, GeGLU with GELU
Cost      2 D F or 3 D F weights; with the same ratio a gated MLP is half as large again
"""

import math

from torch import Tensor, nn

from blagpt_pl.nn.base import ActivationFactory, Carry, ChannelMixer, OutputLinear, Site, StackedLinear, built


def hidden_width(socket: str, site: Site, ratio: float) -> int:
    """F, the ratio's multiple of the stream's width.

    Raises:
        ValueError: not one hidden number is left, or the ratio is not finite.
    """
    hidden = round(ratio * site.d_model) if math.isfinite(ratio) else 0
    if hidden < 1:
        raise ValueError(
            f"layer {site.layer}: {socket}: {ratio} leaves no hidden number at d_model={site.d_model} "
            f"(expected {1 / site.d_model:g} or more, such as 4)"
        )
    return hidden


class MLP(ChannelMixer):
    """W2 · act(W1 x).

    Args:
        site: where it stands.
        activation: the nonlinearity.
        ratio: hidden width over the stream's width.
        bias: whether both linear maps have one.

    Raises:
        ValueError: a ratio that leaves no hidden number.
    """

    def __init__(self, site: Site, activation: ActivationFactory, ratio: float = 4, bias: bool = False) -> None:
        super().__init__()
        hidden = hidden_width("MLP.ratio", site, ratio)  # F
        self.up = nn.Linear(site.d_model, hidden, bias)
        self.activation = built("mlp.activation", activation)
        self.down = OutputLinear(hidden, site.d_model, bias)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(ChannelMixer):
    """Wd · (act(Wg x) ⊙ Wu x), with Wg and Wu stored as one matrix of 2 F rows, the gate's first.

    Args:
        site: where it stands.
        activation: the gate's nonlinearity.
        ratio: hidden width over the stream's width.
        bias: whether the linear maps have one.

    Raises:
        ValueError: a ratio that leaves no hidden number.
    """

    def __init__(self, site: Site, activation: ActivationFactory, ratio: float = 4, bias: bool = False) -> None:
        super().__init__()
        hidden = hidden_width("GatedMLP.ratio", site, ratio)  # F
        self.gate_up = StackedLinear(site.d_model, [hidden, hidden], bias)
        self.activation = built("mlp.activation", activation)
        self.down = OutputLinear(hidden, site.d_model, bias)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(self.activation(gate) * up)
