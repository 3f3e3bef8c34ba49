"""Mamba-2: a selective recurrence whose heads each forget at a rate that the token sets.

Source   Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060, §7 (the block), §6 (SSD)
Formula  [z u B C δ] = W_in x;  [u B C] ← silu(conv([u B C]));  Δ = max(softplus(δ + δ_0), dt_min);  A = -e^{A_log}
         S_t = e^{Δ_t A} S_{t-1} + Δ_t u_t ⊗ B_t;  v_t = S_t C_t + D u_t;  y = W_out (g ⊙ rms(v ⊙ silu(z)))
         norm_before_gate:  y = W_out (g ⊙ rms(v) ⊙ silu(z)); the norm is over each of G groups of channels
Start    softplus(δ_0) log-uniform in [0.001, 0.1], A uniform in -[1, 16], D = 1, as in the authors' code
How      by chunks (ssd.py); on CUDA by flash-linear-attention's kernel where it is installed (kernels.py)
Cost     D (2 d + 2 G N + H) + (k + 1) (d + 2 G N) + 3 H + d + d D weights, d = expand D; no biases on the projections
"""

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, OutputLinear, SequenceMixer, Site, StackedLinear, wide
from blagpt_pl.nn.checks import at_least_one, not_negative
from blagpt_pl.nn.recurrent import kernels
from blagpt_pl.nn.recurrent.conv import ShortConv
from blagpt_pl.nn.recurrent.ssd import ssd
from blagpt_pl.nn.recurrent.step_sizes import step_biases

RATES = 1.0, 16.0  # at which the heads forget when they start


class GatedRMSNorm(nn.Module):
    """RMS-normalise groups of channels of what is gated, or gate what is normalised.

    Args:
        dim: width of all groups.
        groups: how many.
        gate_first: whether the gate comes before the norm.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, groups: int, gate_first: bool, eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.gate_first = gate_first
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x, gate = wide(x), F.silu(wide(gate))
        x = (x * gate if self.gate_first else x).unflatten(-1, (self.groups, -1))
        x = F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2) * wide(self.weight)
        return x if self.gate_first else x * gate


def heads_of(site: Site, expand: int, head_dim: int, n_groups: int) -> int:
    """The number of heads, checked.

    Raises:
        ValueError: the inner width does not split into heads, or the heads not into groups.
    """
    for name, number in {"expand": expand, "head_dim": head_dim, "n_groups": n_groups}.items():
        at_least_one(f"layer {site.layer}: Mamba2.{name}", number)
    inner = expand * site.d_model
    if inner % head_dim:
        fits = sorted((n for n in range(1, inner + 1) if inner % n == 0), key=lambda n: abs(n - head_dim))[:4]
        raise ValueError(
            f"layer {site.layer}: Mamba2.head_dim: {head_dim} does not go into the inner width {inner} = expand {expand} · "
            f"d_model {site.d_model}; nearby ones that do: {sorted(fits)}"
        )
    heads = inner // head_dim
    if heads % n_groups:
        fits = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"layer {site.layer}: Mamba2.n_groups: {n_groups} groups of {heads} heads ({inner} / {head_dim}); choose of {fits}"
        )
    return heads


class Mamba2(SequenceMixer):
    """Mamba-2's mixer: a short convolution, then a state that each head forgets at a rate set by the token, then a gate.

    Args:
        site: where it stands.
        d_state: N, numbers that the state keeps of each channel.
        head_dim: P, channels of a head.
        expand: inner width over the stream's.
        n_groups: G, groups of heads that share where they write and read.
        conv: k, width of the convolution.
        chunk: steps that the torch form computes as one; a matter of speed alone, and a kernel has its own.
        norm_before_gate: whether the norm comes before the gate, not after it.
        dt_min: the smallest step size.
        norm_eps: added to the mean square in the norm.

    Raises:
        ValueError: sizes that do not go into each other, or are below 1.
    """

    continues: ClassVar[bool] = True
    roles: ClassVar[dict[str, str]] = {"A_log": "recurrence", "dt_bias": "recurrence", "D": "recurrence"}
    sizes: ClassVar[dict[str, str]] = {"d_state": "head", "head_dim": "head", "n_groups": "heads", "chunk": "tokens"}

    def __init__(
        self,
        site: Site,
        d_state: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        n_groups: int = 1,
        conv: int = 4,
        chunk: int = 64,
        norm_before_gate: bool = False,
        dt_min: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        for name, number in {"d_state": d_state, "conv": conv, "chunk": chunk}.items():
            at_least_one(f"layer {site.layer}: Mamba2.{name}", number)
        heads = heads_of(site, expand, head_dim, n_groups)
        inner, shared = expand * site.d_model, n_groups * d_state
        self.heads = heads
        self.groups = n_groups
        self.chunk = chunk
        self.dt_min = not_negative("Mamba2.dt_min", dt_min, "0.001")
        self.proj = StackedLinear(site.d_model, [inner, inner, shared, shared, heads], bias=False)
        self.conv = ShortConv(inner + 2 * shared, conv, bias=True)
        self.dt_bias = nn.Parameter(step_biases(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*RATES).log())
        self.D = nn.Parameter(torch.ones(heads))
        eps = not_negative("Mamba2.norm_eps", norm_eps, "1e-5")
        self.norm = GatedRMSNorm(inner, n_groups, not norm_before_gate, eps)
        self.out = OutputLinear(inner, site.d_model, bias=False)
        self.inner, self.shared = inner, shared

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return kernels.NAME if kernels.available(device, dtype) else f"chunks of {min(self.chunk, tokens)}"

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        past = None if carry.states is None else carry.states.take()
        recent, state = (None, None) if past is None else past
        inner, shared = self.inner, self.shared
        z, ubc, dt = self.proj(x).split([inner, inner + 2 * shared, self.heads], dim=-1)
        ubc, recent = self.conv(ubc, recent)
        u, b, c = F.silu(ubc).split([inner, shared, shared], dim=-1)
        u = wide(u).unflatten(-1, (self.heads, -1))  # (B, T, H, P)
        b, c = (t.unflatten(-1, (self.groups, -1)) for t in (b, c))  # (B, T, G, N)
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(min=self.dt_min)  # (B, T, H)
        scan = kernels.ssd if kernels.available(x.device, x.dtype) else partial(ssd, chunk=self.chunk)
        y, state = scan(u * dt[..., None], -dt * wide(self.A_log).exp(), b, c, state)
        y = torch.addcmul(y, wide(self.D)[:, None], u)
        y = self.norm(y.flatten(-2), z)  # (B, T, expand D)
        if carry.states is not None:
            carry.states.leave(recent, state)
        return self.out(y.to(x.dtype))
