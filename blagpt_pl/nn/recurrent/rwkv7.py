"""RWKV-7 "Goose": a state that is edited in place by the delta rule, with decay and learning rate of every channel set by the token.

Source   Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv:2503.14456, §4; constants and start from
         the authors' training code (RWKV-LM, RWKV-v7/train_temp)
Formula  with x_s = x + μ_s ⊙ (shift(x) - x) for s of r w k v a g, low ranks f_s(x) = φ(x A_s) B_s:
         r = W_r x_r;  k = W_k x_k;  v = W_v x_v;  log w = -e^{-½} σ(w_0 + f_w(x_w)), φ = tanh;  β = σ(a_0 + f_a(x_a));  g = f_g(x_g), φ = σ
         κ = ξ ⊙ k, of unit length in each head;  k ← k ⊙ (1 + α ⊙ (β - 1))
         v ← v + (v_1 - v) ⊙ σ(v_0 + f_v(x_v)), v_1 the first layer's v; that layer has no v_0, f_v
         S_t = S_{t-1} (diag(w_t) - κ_tᵀ (β_t ⊙ κ_t)) + v_tᵀ k_t;  y_t = S_t r_t, for each head (nn/recurrent/delta.py)
         out = W_o (g ⊙ (GroupNorm(y) + (Σ_head r ⊙ k ⊙ ρ) v)), eps of the norm 64e-5
Start    μ, w_0, a_0, v_0, ξ, α, ρ, the norm's gain and A_s, B_s here, by the layer's place; the maps by the model's `init`
Ranks    max(32, 32 round(c sqrt(D) / 32)), c = 2.5 of w and a, 1.7 of v, 5 of g: 64, 64, 32, 128 at D = 768
Cost     4 D² + 2 D (R_w + R_a + R_v + R_g) + 14 D weights; without R_v and 13 D in the first layer. FLOPs of these and of the rule
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, OutputLinear, SequenceMixer, Site, wide
from blagpt_pl.nn.checks import at_least_one
from blagpt_pl.nn.recurrent import kernels
from blagpt_pl.nn.recurrent.delta import CHUNK, dplr
from blagpt_pl.nn.recurrent.rwkv7_channel import shifted
from blagpt_pl.nn.recurrent.rwkv7_init import OrthogonalLinear, bends, decays, mixing

FIRST = "rwkv7.first_values"  # in the carry's memo
STRONGEST = math.exp(-0.5)  # -log w of a channel that forgets as fast as any may
NORM_EPS = 64e-5
RANKS = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}  # times sqrt(D), rounded to 32
MIX_EXPONENTS = 0.2, 0.9, 0.7, 0.7, 0.9, 0.2  # of r w k v a g


class HeadNorm(nn.GroupNorm):
    """Normalise each head, whatever the input's dtype in float32 at least: (B, T, H, K) -> (B, T, D)."""

    def forward(self, y: Tensor) -> Tensor:
        flat = wide(y).reshape(-1, self.num_channels)  # a token alone
        return F.group_norm(flat, self.num_groups, wide(self.weight), wide(self.bias), self.eps).view(*y.shape[:2], -1)


class LowRank(nn.Module):
    """x (..., D) -> φ(x A) B (..., D); it starts at φ(0) B, the same for every input, for A starts at zero.

    Args:
        width: D.
        rank: R.
        inner: φ, or None.
    """

    roles: ClassVar[dict[str, str]] = {"down": "recurrence", "up": "recurrence"}

    def __init__(self, width: int, rank: int, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(width, rank))
        self.up = nn.Parameter(torch.empty(rank, width))
        self.inner = nn.Identity() if inner is None else inner
        nn.init.orthogonal_(self.up, 0.1 * max(1, rank / width) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.down) @ self.up


class RWKV7TimeMix(SequenceMixer):
    """RWKV-7's mixer of positions: a state of K × K numbers a head, edited by a delta rule whose every rate the token sets.

    Args:
        site: where it stands; the first layer leaves its values for all others.
        head_dim: K, width of a head.
        decay_rank, rate_rank, value_rank, gate_rank: of the low-rank maps to decay, learning rate, value mix and gate; by
            the formula above where they are not given.

    Raises:
        ValueError: heads that the width does not split into, a rank below 1; and, when it runs, no values of a first layer.
    """

    continues: ClassVar[bool] = True
    sizes: ClassVar[dict[str, str]] = {
        "head_dim": "head",
        "decay_rank": "width",
        "rate_rank": "width",
        "value_rank": "width",
        "gate_rank": "width",
    }
    roles: ClassVar[dict[str, str]] = {
        "decay": "timescale",
        **dict.fromkeys(("mix", "rate", "value", "removal", "mildness", "bonus"), "recurrence"),
    }

    def __init__(
        self,
        site: Site,
        head_dim: int = 64,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
    ) -> None:
        super().__init__()
        width, layer = site.d_model, site.layer
        at_least_one(f"layer {layer}: RWKV7TimeMix.head_dim", head_dim)
        if width % head_dim:
            fits = sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: abs(n - head_dim))[:4]
            raise ValueError(
                f"layer {layer}: RWKV7TimeMix.head_dim: {head_dim} does not go into d_model {width}; nearby ones that do: "
                f"{sorted(fits)}"
            )
        ranks = {"decay": decay_rank, "rate": rate_rank, "value": value_rank, "gate": gate_rank}
        for name, rank in ranks.items():
            by_formula = max(32, 32 * round(RANKS[name] * width**0.5 / 32))
            ranks[name] = by_formula if rank is None else at_least_one(f"layer {layer}: RWKV7TimeMix.{name}_rank", rank)
        self.layer = layer
        self.is_first = layer == 0
        self.head_dim = head_dim

        above = 1 - layer / site.n_layers  # the share of the layers from here on
        self.mix = nn.Parameter(torch.stack([mixing(site, e * above) for e in MIX_EXPONENTS]))  # μ, (6, D)
        self.decay = nn.Parameter(decays(site, head_dim))  # w_0
        lean = torch.linspace(-0.5, 0.5, width)
        self.rate = nn.Parameter(-0.19 + 0.3 * bends(width, head_dim) + 0.4 * lean)  # a_0
        self.value = None if self.is_first else nn.Parameter(0.73 - 0.4 * lean)  # v_0
        self.removal = nn.Parameter(0.71 - 0.1 * lean)  # ξ
        self.mildness = nn.Parameter(torch.full((width,), 1.02))  # α
        self.bonus = nn.Parameter(torch.full((width // head_dim, head_dim), -0.04))  # ρ

        self.r, self.k, self.v = (OrthogonalLinear(width, width, gain) for gain in (1.0, 0.1, 1.0))
        self.to_decay = LowRank(width, ranks["decay"], nn.Tanh())
        self.to_rate = LowRank(width, ranks["rate"])
        self.to_value = None if self.is_first else LowRank(width, ranks["value"])
        self.to_gate = LowRank(width, ranks["gate"], nn.Sigmoid())
        self.norm = HeadNorm(width // head_dim, width, NORM_EPS)
        nn.init.constant_(self.norm.weight, ((1 + layer) / site.n_layers) ** 0.7)
        self.out = OutputLinear(width, width, bias=False)

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return kernels.NAME if kernels.available(device, dtype) else f"chunks of {min(CHUNK, tokens)}"

    def values(self, x: Tensor, carry: Carry) -> Tensor:
        """(B, T, D) -> (B, T, D): the values, those of the first layer mixed in.

        Raises:
            ValueError: there are none.
        """
        v = self.v(x)
        if self.is_first:
            carry.memo[FIRST] = v
            return v
        first = carry.memo.get(FIRST)
        if first is None:
            raise ValueError(
                f"layer {self.layer}: RWKV7TimeMix mixes in the values of layer 0, which left none in this stream; fix: "
                "RWKV7TimeMix as the sequence mixer of the stream's first layer, too"
            )
        share = torch.sigmoid(wide(self.value) + wide(self.to_value(x)))
        return torch.lerp(wide(v), wide(first), share).to(v.dtype)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        before, last, state = shifted(x, carry)
        change = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * share for share in self.mix)
        r, k, v, gate = self.r(x_r), self.k(x_k), self.values(x_v, carry), self.to_gate(x_g)
        to_decay, to_rate = self.to_decay(x_w), self.to_rate(x_a)
        log_w = -STRONGEST * torch.sigmoid(wide(self.decay) + wide(to_decay))
        rate = torch.sigmoid(wide(self.rate) + wide(to_rate))  # β
        removed = F.normalize(self.in_heads(wide(k) * wide(self.removal)), dim=-1)  # κ, of k as it was
        k = wide(k) * (1 + wide(self.mildness) * (rate - 1))
        r, log_w, k, v, rate = (self.in_heads(wide(t)) for t in (r, log_w, k, v, rate))  # (B, T, H, K)
        run = kernels.dplr if kernels.available(x.device, v.dtype) else dplr
        y, memory = run(r, log_w, k, v, -removed, removed * rate, *state)
        now = (r * k * wide(self.bonus)).sum(-1, keepdim=True) * v  # (B, T, H, K)
        y = self.norm(y) + now.flatten(2)
        if carry.states is not None:
            carry.states.leave(last, memory)
        return self.out(y.to(gate.dtype) * gate)

    def in_heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, H, K)."""
        return x.unflatten(-1, (-1, self.head_dim))
