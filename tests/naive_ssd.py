"""What nn/recurrent computes, written out token by token from the formulas."""

import torch
from torch import Tensor


def ssd(x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """S ← e^a S + x ⊗ b, y = S c, for x (B, T, H, P), a (B, T, H), b and c (B, T, G, N), S (B, H, P, N)."""
    each = x.shape[2] // b.shape[2]  # heads of a group
    b, c = b.repeat_interleave(each, 2), c.repeat_interleave(each, 2)
    s = x.new_zeros(len(x), *x.shape[2:], b.shape[-1]) if state is None else state
    y = []
    for t in range(x.shape[1]):
        s = log_decay[:, t, :, None, None].exp() * s + torch.einsum("bhp,bhn->bhpn", x[:, t], b[:, t])
        y.append(torch.einsum("bhpn,bhn->bhp", s, c[:, t]))
    return torch.stack(y, 1), s


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None = None) -> Tensor:
    """y_t = Σ_i w_{k-1-i} x_{t-i} + b, for x (B, T, C) after past (B, k - 1, C), w (C, k)."""
    width = weight.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for i in range(width):
            if t >= i:
                y[:, t] += weight[:, width - 1 - i] * x[:, t - i]
            elif past is not None:
                y[:, t] += weight[:, width - 1 - i] * past[:, width - 1 + t - i]
    return y if bias is None else y + bias


def mamba2(x: Tensor, part: torch.nn.Module, norm_before_gate: bool, dt_min: float, eps: float) -> Tensor:
    """The whole mixer for (B, T, D), by the weights of a `Mamba2`."""
    heads, groups, inner, shared = part.heads, part.groups, part.inner, part.shared
    w_z, w_x, w_b, w_c, w_dt = part.proj.weight.split([inner, inner, shared, shared, heads])
    z = x @ w_z.T
    ubc = torch.cat([x @ w_x.T, x @ w_b.T, x @ w_c.T], -1)
    ubc = conv(ubc, part.conv.weight, part.conv.bias)
    u, b, c = (ubc * ubc.sigmoid()).split([inner, shared, shared], -1)
    u, b, c = (t.reshape(*x.shape[:2], n, -1) for t, n in ((u, heads), (b, groups), (c, groups)))
    dt = ((x @ w_dt.T + part.dt_bias).exp() + 1).log().clamp(min=dt_min)
    y, _ = ssd(u * dt[..., None], -dt * part.A_log.exp(), b, c)
    y = (y + part.D[:, None] * u).flatten(2)
    gate = z * z.sigmoid()
    y = (y if norm_before_gate else y * gate).unflatten(-1, (groups, -1))
    y = (y / (y.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(2) * part.norm.weight
    return (y * gate if norm_before_gate else y) @ part.out.weight.T
