"""The hourglass as Algorithm 1 says it: one group and one position after the other, every score written out."""

import torch
from helpers import carry_of
from torch import Tensor, nn

from blagpt_pl.models.hourglass import Hourglass
from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.attention.edit_rope import angles
from blagpt_pl.nn.pooling import AttentionPool, AveragePool, LinearPool
from blagpt_pl.nn.upsampling import AttentionUpsample, LinearUpsample, RepeatUpsample


def turned(head: Tensor, position: int, theta: float | None) -> Tensor:
    """RoPE of one head (B, K), or what it was."""
    if theta is None:
        return head
    angle = angles(64, head.shape[-1], theta, head.device)  # the house's table, in float32
    cos, sin = (f(angle)[position].to(head.dtype) for f in (torch.cos, torch.sin))
    a, b = head.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def read(part: CrossAttention, query: Tensor, keys: list[Tensor], t: int = 0, stride: int = 0) -> Tensor:
    """One position (B, D), which stands at t, reads others (B, D), of which number s stands at s times the stride."""
    n, groups, width = part.heads.n, part.heads.n_kv, part.heads.dim
    q = part.q(query).split(width, -1)
    kv = [part.kv(c).split(width, -1) for c in keys]
    found = []
    for h in range(n):
        g = h // (n // groups)
        mine = turned(part.q_norm(q[h]), t, part.theta)
        theirs = [turned(part.k_norm(c[g]), s * stride, part.theta) for s, c in enumerate(kv)]
        scores = torch.stack([(mine * k).sum(-1) / width**0.5 for k in theirs], dim=1)  # (B, S)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        found.append(sum(weights[:, s, None] * c[groups + g] for s, c in enumerate(kv)))
    return part.out(torch.cat(found, dim=-1))


def with_mlp(part: nn.Module, y: Tensor) -> Tensor:
    """What the MLP makes of a vector (B, D), if there is one."""
    return 0.0 if part.mlp is None else part.mlp(part.mlp_norm(y), carry_of(y[:, None]))


def pooled(part: nn.Module, group: list[Tensor]) -> Tensor:
    """k vectors (B, D) -> (B, D)."""
    d = group[0].shape[-1]
    match part:
        case AveragePool():
            return sum(group) / len(group)
        case LinearPool():
            y = sum(x @ part.map.weight[:, j * d : (j + 1) * d].T for j, x in enumerate(group))
            return y if part.map.bias is None else y + part.map.bias
        case AttentionPool():
            y = pooled(part.pool, group)
            y = y + read(part.attention, part.query_norm(y), [part.key_norm(x) for x in group])
            return y + with_mlp(part, y)
    raise AssertionError(part)


def upsampled(part: nn.Module, x: Tensor, coarse: list[Tensor], t: int, k: int) -> Tensor:
    """What is added to x (B, D), which stands at t; coarse vectors are (B, D)."""
    d, (i, j) = x.shape[-1], divmod(t, k)
    match part:
        case RepeatUpsample():
            return coarse[i]
        case LinearUpsample():
            rows = slice(j * d, (j + 1) * d)
            u = coarse[i] @ part.map.weight[rows].T
            return u if part.map.bias is None else u + part.map.bias[rows]
        case AttentionUpsample():
            u = upsampled(part.upsample, x, coarse, t, k)
            known = [part.key_norm(c) for c in coarse[: i + 1]]
            u = u + read(part.attention, part.query_norm(x + u), known, t, k)
            return u + with_mlp(part, x + u)
    raise AssertionError(part)


def stream(model: Hourglass, x: Tensor, i: int = 0) -> Tensor:
    """HOURGLASS(x, factors[i:]) of (B, T, D)."""
    for block in model.stacks[i]:
        x = block(x, carry_of(x))
    if i == len(model.factors):
        return x
    k, places = model.factors[i], list(x.unbind(1))
    zero = torch.zeros_like(places[0])
    late = [zero] * (k - 1) + places
    groups = [late[s * k : (s + 1) * k] for s in range(-(-len(places) // k))]
    coarse = torch.stack([pooled(model.shorten[i].pool, group) for group in groups], dim=1)
    coarse = model.lengthen[i].norm(stream(model, coarse, i + 1))
    known, up = list(coarse.unbind(1)), model.lengthen[i].upsample
    x = torch.stack([p + upsampled(up, p, known, t, k) for t, p in enumerate(places)], dim=1)
    for block in model.stacks[-1 - i]:
        x = block(x, carry_of(x))
    return x


def logits(model: Hourglass, tokens: Tensor) -> Tensor:
    """(B, T) -> (B, T, V)."""
    return model.head(model.norm(stream(model, model.embedding(tokens))))
