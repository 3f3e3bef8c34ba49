"""A transformer block that is used at several depths of a stack of recurrences, and the layer that takes up what it says.

Source   Glorioso et al. 2024, "Zamba2", arXiv:2411.15242, §2.1; equations as in transformers' `Zamba2HybridLayer`
Formula  n = norm(attention([x, x0]));  [g u] = W_gu n + B_l A_l n;  s = W_d (act(g) ⊙ u): no residual within the block;
         x ← x + mixer(norm(x + W_l s)): the stream itself does not get what the block says
Cost     D (2 F) + F D + D weights beside the attention, once for all uses; D² for each use, and its adapters
"""

from collections.abc import Callable

from torch import Tensor, nn

from blagpt_pl.nn.adapters import Adapted, low_rank
from blagpt_pl.nn.attention.shared import SharedAttention
from blagpt_pl.nn.base import (
    ActivationFactory,
    Carry,
    NormFactory,
    SequenceMixerFactory,
    Site,
    StackedLinear,
    built,
)
from blagpt_pl.nn.mlp import hidden_width

SHARED = "shared"  # where the carry's memo holds what the block said, for the layer that takes it up
SharedAttentionFactory = Callable[[Site], SharedAttention]


class SharedBlock(nn.Module):
    """Attention over the stream and the embeddings, then a gated MLP to which each use adds a low-rank map.

    (x, carry) -> s, both (B, T, D); the carry's memo holds the maps of the use (`Adapters`).

    Args:
        site: where it stands first.
        attention: what it begins with.
        norm: normalisation of what the attention returns.
        activation: of the MLP's gate.
        ratio: hidden width over the stream's width.

    Raises:
        ValueError: a ratio that leaves no hidden number, or an attention that is no `SharedAttention`.
    """

    def __init__(
        self,
        site: Site,
        attention: SharedAttentionFactory,
        norm: NormFactory,
        activation: ActivationFactory,
        ratio: float = 4,
    ) -> None:
        super().__init__()
        d, hidden = site.d_model, hidden_width("SharedBlock.ratio", site, ratio)  # D, F
        self.attention = built("shared.attention", attention, site)
        if not isinstance(self.attention, SharedAttention):
            raise ValueError(  # noqa: TRY004
                f"shared.attention: {type(self.attention).__name__} does not read the embeddings beside the stream "
                "(expected SharedAttention)"
            )
        self.norm = built("shared.norm", norm, d)
        self.gate_up = StackedLinear(d, [hidden, hidden], bias=False)
        self.activation = built("shared.activation", activation)
        self.down = nn.Linear(hidden, d, bias=False)  # not into the stream

    def maps(self) -> dict[str, Adapted]:
        """What each use adds to."""
        gate_up = Adapted(self.gate_up.in_features, self.gate_up.rows, self.gate_up.heads)
        return {**self.attention.maps(), "gate_up": gate_up}

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        x = self.norm(self.attention(x, carry))
        gate, up = (self.gate_up(x) + low_rank(x, "gate_up", carry.memo)).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(self.activation(gate) * up)


SharedBlockFactory = Callable[[Site], SharedBlock]


class TakingUp(nn.Module):
    """x + mixer(norm(x + W s)), s what a shared block has said: `carry.memo["shared"]`.

    Args:
        site: where it stands.
        norm: normalisation of the mixer's input.
        mixer: what the layer is.
    """

    def __init__(self, site: Site, norm: NormFactory, mixer: SequenceMixerFactory) -> None:
        super().__init__()
        self.enter = nn.Linear(site.d_model, site.d_model, bias=False)
        self.norm = built("model.norm", norm, site.d_model)
        self.mixer = built("model.mamba", mixer, site)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return x + self.mixer(self.norm(x + self.enter(carry.memo[SHARED])), carry)
