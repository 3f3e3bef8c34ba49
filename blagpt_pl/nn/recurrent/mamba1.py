"""Mamba: a recurrence whose channels each keep N numbers, written, read and forgotten as the token says.

Source   Gu & Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752, §3.4, Algorithm 2
Formula  [u z] = W_in x;  u ← silu(conv(u));  [δ B C] = W_x u, each normed where asked for (Zuo et al. 2024, "Falcon Mamba",
         arXiv:2410.05355; Hymba);  Δ = softplus(W_Δ δ + b_Δ);  A = -e^{A_log};  h_t = e^{Δ_t A} ⊙ h_{t-1} + Δ_t u_t B_t;
         v_t = h_t · C_t + D u_t;  y = W_out (v ⊙ silu(z))
Start    softplus(b_Δ) log-uniform in [0.001, 0.1], W_Δ uniform within R^{-1/2}, A = -(1 ... N) for every channel, D = 1
How      nn/recurrent/selective_scan.py
Cost     2 D d + (k + 1) d + d (R + 2 N) + R d + d + d N + d + d D weights, d = expand D, R = ceil(D / 16); with norms R + 2 N gains.
         FLOPs a token: 2 (3 D d + d (2 R + 2 N)); convolution and scan are elementwise, and count as nothing
"""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import Carry, NormFactory, OutputLinear, SequenceMixer, Site, StackedLinear, built, wide
from blagpt_pl.nn.checks import at_least_one
from blagpt_pl.nn.recurrent.conv import ShortConv
from blagpt_pl.nn.recurrent.selective_scan import SelectiveScan, form
from blagpt_pl.nn.recurrent.step_sizes import step_biases

Memory = tuple[Tensor, Tensor]  # the last k - 1 inputs of the convolution, and the state


class SelectiveSSM(nn.Module):
    """Convolution, selective scan and gate: what lies between Mamba's maps from the stream and into it.

    Args:
        inner: d, channels.
        d_state: N, numbers that are kept of each channel.
        conv: k, width of the convolution.
        dt_rank: R, numbers that set the step sizes of all channels.
        norm: of the step sizes' numbers, of B and of C; none if None.
    """

    roles: ClassVar[dict[str, str]] = dict.fromkeys(("A_log", "D", "dt_weight", "dt_bias"), "recurrence")

    def __init__(self, inner: int, d_state: int, conv: int, dt_rank: int, norm: NormFactory | None) -> None:
        super().__init__()
        self.rows = [dt_rank, d_state, d_state]
        self.conv = ShortConv(inner, conv, bias=True)
        self.proj = StackedLinear(inner, self.rows, bias=False)
        self.dt_bias = nn.Parameter(step_biases(inner))
        self.dt_weight = nn.Parameter(torch.empty(inner, dt_rank).uniform_(-(dt_rank**-0.5), dt_rank**-0.5))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.scan = SelectiveScan()
        self.norms = None if norm is None else nn.ModuleList(built("norm", norm, width) for width in self.rows)

    def forward(self, u: Tensor, z: Tensor, past: Memory | None = None) -> tuple[Tensor, Memory]:
        """u and the gate z (B, T, d), and what was left of the piece before -> the same shape, and what the next piece needs."""
        recent, state = (None, None) if past is None else past
        u, recent = self.conv(u, recent)
        u = F.silu(u)
        dt, b, c = self.proj(u).split(self.rows, dim=-1)
        if self.norms is not None:
            dt, b, c = (norm(t) for norm, t in zip(self.norms, (dt, b, c), strict=True))
        dtype, u = u.dtype, wide(u)
        with without_autocast(u.device):
            dt = F.softplus(F.linear(wide(dt), wide(self.dt_weight), wide(self.dt_bias)))  # (B, T, d)
            y, state = self.scan(u, dt, -wide(self.A_log).exp(), b, c, state)
            y = torch.addcmul(y, wide(self.D), u) * F.silu(wide(z))
        return y.to(dtype), (recent, state)


def rank_of(site: Site, part: str, dt_rank: int | None) -> int:
    """R, ceil(D / 16) by default.

    Raises:
        ValueError: it is below 1.
    """
    return at_least_one(f"layer {site.layer}: {part}.dt_rank", -(-site.d_model // 16) if dt_rank is None else dt_rank)


class Mamba1(SequenceMixer):
    """Mamba's mixer: a short convolution, then a state that each channel forgets at rates set by the token, then a gate.

    Args:
        site: where it stands.
        d_state: N, numbers that are kept of each channel.
        expand: inner width over the stream's.
        conv: k, width of the convolution.
        dt_rank: R, numbers that set the step sizes of all channels; ceil(D / 16) by default.
        norm: of the step sizes' numbers, of B and of C; none by default.

    Raises:
        ValueError: a size below 1.
    """

    continues: ClassVar[bool] = True
    sizes: ClassVar[dict[str, str]] = {"d_state": "head", "dt_rank": "head"}

    def __init__(
        self,
        site: Site,
        d_state: int = 16,
        expand: int = 2,
        conv: int = 4,
        dt_rank: int | None = None,
        norm: NormFactory | None = None,
    ) -> None:
        super().__init__()
        for name, number in {"d_state": d_state, "expand": expand, "conv": conv}.items():
            at_least_one(f"layer {site.layer}: Mamba1.{name}", number)
        inner = expand * site.d_model  # d
        self.proj = StackedLinear(site.d_model, [inner, inner], bias=False)
        self.ssm = SelectiveSSM(inner, d_state, conv, rank_of(site, "Mamba1", dt_rank), norm)
        self.out = OutputLinear(inner, site.d_model, bias=False)

    def kernel(self, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
        """How it is computed there in training."""
        return form(device, tokens)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        past = None if carry.states is None else carry.states.take()
        u, z = self.proj(x).chunk(2, dim=-1)  # (B, T, d) each
        y, left = self.ssm(u, z, past)
        if carry.states is not None:
            carry.states.leave(*left)
        return self.out(y)
