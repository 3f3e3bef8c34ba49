"""Cross-attention: the definition, with and without a stride, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from helpers import SITE, shake
from torch.nn import functional as F

from blagpt_pl.nn.attention import backends
from blagpt_pl.nn.attention.cross import CrossAttention, read_by_groups, read_by_mask
from blagpt_pl.nn.attention.edit_rope import angles, rotate
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.roles import blocks_of, splits_of


@pytest.mark.parametrize(("stride", "groups"), [(1, 4), (3, 2), (4, 1), (8, 4)])
def test_a_stride_is_its_mask(stride: int, groups: int) -> None:
    q = torch.randn(2, 4, 5 * stride, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, groups, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(2, 4, 5 * stride, 8, dtype=torch.float64)
    found = []
    for read in (read_by_groups, read_by_mask):
        y = read(q, k, v)
        found.append([y, *torch.autograd.grad((y * weights).sum(), (q, k, v))])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("stride", [None, 3])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "qk_norm": RMSNorm, "qkv_bias": True, "out_bias": True}])
def test_it_is_its_formula(stride: int | None, changes: dict) -> None:
    part = shake(CrossAttention(SITE, stride, n_heads=4, **changes), 0.3).double()
    x, context = torch.randn(2, 12, 32, dtype=torch.float64), torch.randn(2, 4, 32, dtype=torch.float64)
    q = part.q(x).view(2, 12, 4, 8)
    groups = part.heads.n_kv
    k, v = (t.reshape(2, 4, groups, 8) for t in part.kv(context).split([groups * 8, groups * 8], -1))
    q, k = part.q_norm(q), part.k_norm(k)
    expected = torch.zeros(2, 12, 4, 8, dtype=torch.float64)
    for t in range(12):
        seen = 4 if stride is None else t // stride + 1
        for h in range(4):
            g = h // (4 // groups)
            p = torch.einsum("bk,bsk->bs", q[:, t, h], k[:, :seen, g]).div(8**0.5).softmax(-1)
            expected[:, t, h] = torch.einsum("bs,bsk->bk", p, v[:, :seen, g])
    expected = F.linear(expected.flatten(2), part.out.weight, part.out.bias)
    assert (part(x, context) - expected).abs().max() < 1e-10


def test_rope_turns_both_streams_on_one_grid() -> None:
    part = shake(CrossAttention(SITE, 3, n_heads=4, theta=100.0), 0.3).double()
    x, context = torch.randn(2, 12, 32, dtype=torch.float64), torch.randn(2, 4, 32, dtype=torch.float64)
    angle = angles(12, 8, 100.0, x.device)
    q = rotate(part.q(x).view(2, 12, 4, 8).transpose(1, 2), angle)
    k, v = (t.reshape(2, 4, 4, 8).transpose(1, 2) for t in part.kv(context).chunk(2, -1))
    k = rotate(k, angle[[0, 3, 6, 9]])
    expected = part.out(read_by_mask(q, k, v).transpose(1, 2).flatten(2))
    assert (part(x, context) - expected).abs().max() < 1e-10


def test_what_has_no_positions_is_not_turned() -> None:
    with pytest.raises(ValueError, match="CrossAttention.theta: 100.0, but what it reads has no positions"):
        CrossAttention(SITE, None, n_heads=4, theta=100.0)
    with pytest.raises(ValueError, match="head_dim is 5"):
        CrossAttention(replace(SITE, d_model=20), 2, n_heads=4, theta=100.0)


def test_more_sequences_than_a_kernel_takes_are_called_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(7, 4, 5, 8), torch.randn(7, 2, 5, 8), torch.randn(7, 2, 5, 8)
    whole = backends.causal(q, k, v, 0.0, grouped=True)
    calls, attention = [], F.scaled_dot_product_attention

    def counted(q: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        calls.append((len(q), *args[3:], *options.values()))
        return attention(q, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(backends, "MOST", 3)
    assert torch.equal(backends.causal(q, k, v, 0.0, grouped=True), whole)
    assert calls == [(n, 0.0, True, True) for n in (3, 3, 1)]
    calls.clear()
    backends.attend(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1), 0.5, grouped=False, is_causal=False)
    assert calls == [(n, 0.5, False, False) for n in (3, 3, 1)]


def test_an_optimizer_of_matrices_sees_keys_and_values_apart() -> None:
    """And one that scales by heads sees those of queries and keys, while every row of values acts alone."""
    part = CrossAttention(SITE, None, n_heads=4, n_kv_heads=2)
    assert splits_of(part) == {"q.weight": (32,), "kv.weight": (16, 16)}
    assert blocks_of(part) == {"q.weight": ((32, 8),), "kv.weight": ((16, 8), (16, 1))}
