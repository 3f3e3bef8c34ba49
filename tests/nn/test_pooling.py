"""Poolings and upsamplings: their formulas, group by group and position by position, and what each may read."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SITE, gated, shake
from naive_hourglass import pooled, upsampled
from torch import Tensor, nn

from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.base import Carry, ChannelMixer, OutputLinear, Site
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.nn.pooling import AttentionPool, AveragePool, LinearPool, Pool, late_groups
from blagpt_pl.nn.roles import splits_of
from blagpt_pl.nn.upsampling import AttentionUpsample, LinearUpsample, RepeatUpsample, Upsample

SMALL = replace(SITE, d_model=12)
D, S = SMALL.d_model, 4
cross = partial(CrossAttention, n_heads=2)
POOLS = {
    "average": AveragePool,
    "linear": LinearPool,
    "linear, bias": partial(LinearPool, bias=True),
    "attention over average": partial(AttentionPool, pool=AveragePool, attention=cross, norm=RMSNorm),
    "attention over linear, MLP": partial(
        AttentionPool,
        pool=LinearPool,
        attention=partial(cross, n_kv_heads=1, qk_norm=RMSNorm, qkv_bias=True, out_bias=True),
        norm=LayerNorm,
        mlp=gated,
    ),
}
UPSAMPLINGS = {
    "repeat": RepeatUpsample,
    "linear": LinearUpsample,
    "linear, bias": partial(LinearUpsample, bias=True),
    "attention over repeat": partial(AttentionUpsample, upsample=RepeatUpsample, attention=cross, norm=RMSNorm),
    "attention over linear, MLP": partial(
        AttentionUpsample,
        upsample=LinearUpsample,
        attention=partial(cross, n_kv_heads=1, qk_norm=RMSNorm, theta=50.0, qkv_bias=True, out_bias=True),
        norm=LayerNorm,
        mlp=gated,
    ),
}


def gap(mine: Tensor, naive: Tensor, by: list[Tensor]) -> float:
    """The largest difference, of values and of gradients."""
    weights = torch.randn_like(naive)
    found = [[y, *torch.autograd.grad((y * weights).sum(), by)] for y in (mine, naive)]
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("build", POOLS.values(), ids=POOLS)
def test_a_pooling_is_its_formula(build: Callable, factor: int) -> None:
    part = shake(build(SMALL, factor), 0.3).double()
    x = torch.randn(2, S * factor, D, dtype=torch.float64, requires_grad=True)
    naive = torch.stack([pooled(part, group.unbind(1)) for group in x.split(factor, dim=1)], dim=1)
    mine = part(x, torch.zeros(2, S, dtype=torch.int64))
    assert mine.shape == (2, S, D)
    assert gap(mine, naive, [x, *part.parameters()]) < 1e-10
    with torch.no_grad():
        moved = x.clone()
        moved[:, factor] += torch.randn(D)  # of the second group
        change = (part(moved, torch.zeros(2, S, dtype=torch.int64)) - mine).abs().amax((0, 2))
    assert change[1] > 1e-3
    assert change[[0, 2, 3]].max() < 1e-12


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("build", UPSAMPLINGS.values(), ids=UPSAMPLINGS)
def test_an_upsampling_is_its_formula(build: Callable, factor: int) -> None:
    part = shake(build(SMALL, factor), 0.3).double()
    x, coarse = (torch.randn(2, n, D, dtype=torch.float64, requires_grad=True) for n in (S * factor, S))
    known = list(coarse.unbind(1))
    naive = torch.stack([upsampled(part, p, known, t, factor) for t, p in enumerate(x.unbind(1))], dim=1)
    tokens = torch.zeros(2, S * factor, dtype=torch.int64)
    mine = part(x, coarse, tokens)
    assert mine.shape == x.shape
    by = [coarse, *part.parameters(), *([x] if isinstance(part, AttentionUpsample) else [])]
    assert gap(mine, naive, by) < 1e-10
    with torch.no_grad():
        moved = coarse.clone()
        moved[:, 2] += torch.randn(D)
        change = (part(x, moved, tokens) - mine).abs().amax((0, 2))  # (S k,)
    assert change[: 2 * factor].max() < 1e-12
    assert change[2 * factor : 3 * factor].min() > 1e-3
    reads_the_past = isinstance(part, AttentionUpsample)
    assert (change[3 * factor :].min() > 1e-6) == reads_the_past


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 12, 13])
def test_a_group_ends_with_the_first_position_that_reads_it(length: int, factor: int) -> None:
    x = torch.arange(1.0, length + 1).view(1, length, 1)
    groups = late_groups(x, factor).view(-1, factor).tolist()
    assert len(groups) == -(-length // factor)
    for i, group in enumerate(groups):
        places = range(i * factor - factor + 1, i * factor + 1)
        assert group == [p + 1.0 if p >= 0 else 0.0 for p in places]


class Probe(ChannelMixer):
    """Keeps what it was given."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.seen: list = []

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        self.seen.append((x, carry))
        return torch.zeros_like(x)


def test_an_mlp_is_given_a_carry_of_the_stream_that_it_stands_in() -> None:
    tokens = torch.arange(2 * S * 3).view(2, -1)
    x, coarse = torch.randn(2, S * 3, D), torch.randn(2, S, D)
    pool = AttentionPool(SMALL, 3, AveragePool, cross, RMSNorm, Probe)
    up = AttentionUpsample(SMALL, 3, RepeatUpsample, cross, RMSNorm, Probe)
    pool(x, tokens[:, ::3])
    up(x, coarse, tokens)
    for part, beside in ((pool, tokens[:, ::3]), (up, tokens)):
        ((seen, carry),) = part.mlp.seen
        assert torch.equal(carry.tokens, beside)
        assert seen.shape == carry.x0.shape == (*beside.shape, D)
        assert not carry.memo
    assert torch.equal(up.mlp.seen[0][1].x0, x)  # the stream as it was, without what is added


def test_what_maps_into_the_stream_starts_at_zero_where_outputs_do() -> None:
    for zero in (True, False):
        part = UPSAMPLINGS["attention over linear, MLP"](SMALL, 3)
        GPT2Init(zero_outputs=zero)(part, SMALL)
        written = part(torch.randn(2, 6, D), torch.randn(2, 2, D), torch.zeros(2, 6, dtype=torch.int64))
        assert written.any() != zero
    pool = AttentionPool(SMALL, 3, LinearPool, cross, RMSNorm)
    GPT2Init(zero_outputs=True)(pool, SMALL)
    x = torch.randn(2, 6, D)
    assert torch.equal(pool(x, None), pool.pool(x, None))  # the attention writes nothing yet
    assert pool(x, None).any()


def test_an_optimizer_of_matrices_sees_one_map_a_place() -> None:
    part = LinearUpsample(SMALL, 3)
    assert isinstance(part.map, OutputLinear)
    assert splits_of(part) == {"map.weight": (D, D, D)}
    assert not splits_of(LinearPool(SMALL, 3))


def test_empty_sockets_are_told() -> None:
    class NoModule:
        def __init__(self, *facts: object) -> None:
            pass

    for name in ("pool", "attention", "norm"):
        sockets = {"pool": AveragePool, "attention": cross, "norm": RMSNorm}
        with pytest.raises(ValueError, match=rf"AttentionPool\.{name}: empty"):
            AttentionPool(SMALL, 3, **{**sockets, name: None})
        with pytest.raises(ValueError, match=rf"AttentionPool\.{name}: NoModule is not a"):
            AttentionPool(SMALL, 3, **{**sockets, name: NoModule})
    for name in ("upsample", "attention", "norm"):
        sockets = {"upsample": RepeatUpsample, "attention": cross, "norm": RMSNorm}
        with pytest.raises(ValueError, match=rf"AttentionUpsample\.{name}: empty"):
            AttentionUpsample(SMALL, 3, **{**sockets, name: None})


def test_an_attention_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"CrossAttention\.theta: 50\.0, but what it reads has no positions"):
        AttentionPool(SMALL, 3, AveragePool, partial(cross, theta=50.0), RMSNorm)


@pytest.mark.parametrize("kind", [Pool, Upsample])
def test_a_kind_alone_says_what_is_missing(kind: type[nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} must say how it"):
        kind()(*[None] * (2 if kind is Pool else 3))
