"""Mamba-2, shared blocks, and the stacks of Zamba2 and Rene, written out: a loop over tokens, every score, no kernel."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.models.rene import Rene
from blagpt_pl.models.zamba2 import Zamba2
from blagpt_pl.nn.adapters import Adapters
from blagpt_pl.nn.shared_block import SharedBlock


def rms(x: Tensor, norm: nn.Module) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def mamba2(part: nn.Module, x: Tensor) -> Tensor:
    """One token after the other, one head after the other: (B, T, D) -> (B, T, D)."""
    h, g, k = part.heads, part.groups, part.conv.width
    inner, n = part.inner, part.shared // part.groups
    z, ubc, dt = (x @ part.proj.weight.T).split([inner, inner + 2 * g * n, h], dim=-1)
    dt = F.softplus(dt + part.dt_bias).clamp(min=part.dt_min)  # (B, T, H)
    state = [x.new_zeros(len(x), inner // h, n) for _ in range(h)]
    found = []
    for t in range(x.shape[1]):
        past = [ubc[:, t - i] * part.conv.weight[:, k - 1 - i] for i in range(min(k, t + 1))]
        u, b, c = F.silu(sum(past) + part.conv.bias).split([inner, g * n, g * n], dim=-1)
        u, b, c = u.unflatten(-1, (h, -1)), b.unflatten(-1, (g, n)), c.unflatten(-1, (g, n))
        y = []
        for i in range(h):
            group, step = i * g // h, dt[:, t, i, None, None]
            written = step * u[:, i, :, None] * b[:, group, None, :]  # (B, P, N)
            state[i] = state[i] * torch.exp(-step * part.A_log[i].exp()) + written
            y.append((state[i] * c[:, group, None, :]).sum(-1) + part.D[i] * u[:, i])
        found.append(torch.cat(y, dim=-1))
    y, gate = torch.stack(found, dim=1), F.silu(z)
    y = y * gate if part.norm.gate_first else y
    y = (y.unflatten(-1, (g, -1)).square().mean(-1, keepdim=True) + part.norm.eps).rsqrt() * y.unflatten(-1, (g, -1))
    y = y.flatten(-2) * part.norm.weight
    return (y if part.norm.gate_first else y * gate) @ part.out.weight.T


def read(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Heads (B, H, T, K): every score, of which those within the window count; side by side (B, T, H · K)."""
    t = torch.arange(q.shape[2])
    back = t[:, None] - t  # how far
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) * scale
    weights = scores.masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bhsk->bthk", weights, v).flatten(2)


def turned(x: Tensor, theta: float) -> Tensor:
    """RoPE as a multiplication of complex numbers, which i and i + K/2 are the parts of; angles in float32."""
    a, b = x.chunk(2, dim=-1)
    power = -torch.arange(0, x.shape[-1], 2, dtype=torch.float32) / x.shape[-1]
    angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float32), theta**power)  # (T, K/2)
    y = torch.complex(a, b) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((y.real, y.imag), dim=-1)


def shared(block: SharedBlock, use: Adapters, x: Tensor, x0: Tensor, bug: str) -> Tensor:
    """What a shared block says, with the maps of a use: (B, T, D) -> (B, T, D)."""
    part, maps = block.attention, {name: use.up[name].weight @ m.weight for name, m in use.down.items()}
    u = rms(torch.cat((x0, x) if bug == "order" else (x, x0), dim=-1), part.norm)
    weights = part.qkv.weight.chunk(3)
    q, k, v = (u @ (w + maps.get(name, 0)).T for w, name in zip(weights, "qkv", strict=True))
    q, k, v = (y.unflatten(-1, (part.heads.n, -1)).transpose(1, 2) for y in (q, k, v))
    for edit in part.edits[:-1]:
        q, k = turned(q, edit.theta), turned(k, edit.theta)
    scale = q.shape[-1] ** -0.5 if bug == "scale" else (q.shape[-1] / 2) ** -0.5
    a = read(q, k, v, scale, x.shape[1]) @ part.out.weight.T
    a = a + x if bug == "residual within" else a
    gate, up = (rms(a, block.norm) @ (block.gate_up.weight + maps["gate_up"]).T).chunk(2, dim=-1)
    return (F.gelu(gate) * up) @ block.down.weight.T


def zamba2(model: Zamba2, tokens: Tensor, bug: str = "") -> Tensor:
    """Logits (B, T, V), or what they would be with a mistake."""
    x = x0 = model.embedding.weight[tokens]
    uses = 0
    for letter, layer in zip(model.order, model.layers, strict=True):
        if letter == "m":
            x = x + mamba2(layer.branch.part, rms(x, layer.branch.norm))
            continue
        block = model.shared[(0 if bug == "turns" else uses) % len(model.shared)]
        use = model.adapters[0 if bug == "use" else uses]
        e = shared(block, use, x, x0, bug) @ layer.enter.weight.T
        x = (x + e if bug == "residual" else x) + mamba2(layer.mixer, rms(x + e, layer.norm))
        uses += 1
    return rms(x, model.norm) @ model.embedding.weight.T


def rene(model: Rene, tokens: Tensor, bug: str = "") -> Tensor:
    """Logits (B, T, V), or what they would be with a mistake."""
    x = model.embedding.weight[tokens]
    for letter, block in zip(model.order, model.blocks, strict=True):
        part, y = block.branch.part, rms(x, block.branch.norm)
        if letter == "m":
            y = mamba2(part, y)
        elif letter == "f":
            y = F.gelu(y @ part.up.weight.T + part.up.bias) @ part.down.weight.T + part.down.bias
        else:
            heads = (y @ part.qkv.weight.T + part.qkv.bias).unflatten(-1, (-1, part.heads.dim)).transpose(1, 2)
            q, k, v = heads.chunk(3, dim=1)
            if bug == "positions":
                q, k = turned(q, 10000.0), turned(k, 10000.0)
            window = part.core.window + (bug == "window")
            y = read(q, k, v, part.heads.dim**-0.5, window) @ part.out.weight.T + part.out.bias
        x = y if bug == "residual" else x + y
    return rms(x, model.norm) @ model.embedding.weight.T
