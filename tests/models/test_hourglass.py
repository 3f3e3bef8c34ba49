"""The hourglass: equal to its recursion written out, causal by one place, and its size and cost by formula."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SITE, D, T, V, adamw, attention, batch, block, check_variant, gated, shake
from naive_hourglass import logits
from shipped import BASELINE, MODELS, built
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models import hourglass
from blagpt_pl.models.hourglass import Hourglass
from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.base import Carry, Site, count
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.memory import RecomputeBlocks
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.nn.pooling import AttentionPool, AveragePool, LinearPool
from blagpt_pl.nn.upsampling import AttentionUpsample, LinearUpsample, RepeatUpsample
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing import check_model
from blagpt_pl.testing.promises import check_causal, influence
from blagpt_pl.testing.subject import train

H = 4
cross = partial(CrossAttention, n_heads=H, qk_norm=RMSNorm)
attentive_pool = partial(AttentionPool, pool=LinearPool, attention=cross, norm=RMSNorm)
attentive_upsample = partial(
    AttentionUpsample, upsample=LinearUpsample, attention=partial(cross, theta=100.0), norm=RMSNorm
)
POOLS = {
    "average": AveragePool,
    "linear": partial(LinearPool, bias=True),
    "attention over average": partial(attentive_pool, pool=AveragePool, norm=LayerNorm),
    "attention over linear, MLP": partial(attentive_pool, mlp=gated),
}
UPSAMPLINGS = {
    "repeat": RepeatUpsample,
    "linear": partial(LinearUpsample, bias=True),
    "attention over repeat": partial(attentive_upsample, upsample=RepeatUpsample, norm=LayerNorm),
    "attention over linear, MLP": partial(attentive_upsample, mlp=gated),
}


def small(**changes: object) -> Hourglass:
    """An hourglass with attention around linear poolings, of factor 4; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "n_layers": [1, 2, 1], "factors": [4], "block": block(),
        "pool": attentive_pool, "upsample": attentive_upsample, "norm": RMSNorm, "head": TiedHead,
        "init": GPT2Init(zero_outputs=True), "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return Hourglass(**{**arguments, **changes})


plain = partial(small, pool=AveragePool, upsample=RepeatUpsample)


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


# ---------------------------------------------------------------------- the recursion


def largest_gap(model: Hourglass, length: int) -> float:
    """Between the model and its recursion written out: of the logits, and of every parameter's gradient."""
    shake(model, 0.2).double()
    tokens, found = tokens_of(length), []
    weights = torch.randn(2, length, V, dtype=torch.float64)
    for y in (model(tokens), logits(model, tokens)):
        found.append([y, *torch.autograd.grad((y * weights).sum(), [*model.parameters()])])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("upsample", UPSAMPLINGS)
@pytest.mark.parametrize("pool", POOLS)
def test_it_is_its_recursion(pool: str, upsample: str) -> None:
    assert largest_gap(small(factors=[3], pool=POOLS[pool], upsample=UPSAMPLINGS[upsample]), 8) < 1e-10


@pytest.mark.parametrize(
    ("factors", "n_layers", "length"),
    [
        ([2], [1, 1, 1], 1),
        ([2], [0, 1, 1], 9),
        ([2], [1, 0, 2], 6),
        ([5], [1, 1, 1], 4),
        ([3, 2], [1, 0, 2, 1, 1], 13),
        ([2, 4], [1, 1, 1, 0, 1], 16),
        ([2, 2, 3], [0, 1, 0, 1, 1, 0, 1], 11),
    ],
)
@pytest.mark.parametrize("build", [small, plain])
def test_any_nesting_is_its_recursion(build: Callable, factors: list[int], n_layers: list[int], length: int) -> None:
    assert largest_gap(build(factors=factors, n_layers=n_layers), length) < 1e-10


# ---------------------------------------------------------------------- causality


def reach(model: Hourglass, length: int, training: bool) -> Tensor:
    """(T, T): how far the logits at s move with token t, in float64."""
    model = shake(model, 0.1).double().train(training)
    one, other = tokens_of(length)
    return influence(model, one, torch.where(one == other, (one + 1) % V, other), training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [5, 12, 13])
@pytest.mark.parametrize(("factors", "n_layers"), [([4], [1, 1, 1]), ([3, 2], [1, 1, 1, 1, 1])])
def test_causality(factors: list[int], n_layers: list[int], length: int, training: bool) -> None:
    moved = reach(small(factors=factors, n_layers=n_layers), length, training)
    check_causal(moved, "hourglass")
    assert moved.diagonal().min() > 1e-6  # every token its own logits, the first too


@pytest.mark.parametrize("build", [small, plain])
@pytest.mark.parametrize("places", [0, 2])
def test_a_shift_of_one_place_less_looks_into_the_future(
    build: Callable, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def early_groups(x: Tensor, factor: int) -> Tensor:
        groups = -(-x.shape[1] // factor)
        return F.pad(x, (0, 0, places, groups * factor - places - x.shape[1]))

    monkeypatch.setattr(hourglass, "late_groups", early_groups)
    with pytest.raises(AssertionError, match="looks into the future"):
        check_causal(reach(build(), 13, False), "hourglass")


def test_a_residual_that_is_shifted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recursion adds to the stream as it was."""
    whole = hourglass.Lengthen.forward

    def shifted(self: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        return whole(self, F.pad(x, (0, 0, 1, -1)), carry)

    monkeypatch.setattr(hourglass.Lengthen, "forward", shifted)
    assert largest_gap(small(), 8) > 1e-3


@pytest.mark.parametrize(
    "build",
    [
        small,
        partial(
            plain, factors=[2, 3], n_layers=[0, 1, 1, 0, 1], positions=LearnedPositions, token_bias=True, dropout=0.1,
            init=GPT2Init(zero_outputs=False), losses=[ZLoss, partial(MultiToken, n=3)],
        ),
    ],
    ids=["attention", "plain, nested"],
)  # fmt: skip
def test_promises(build: Callable) -> None:
    """The others take long, and are examined with the shipped configuration by `blagpt check`."""
    verdicts = check_variant(build())
    assert all(v.state == "kept" for v in verdicts)


def test_deep_ones_begin_to_learn_level_by_level() -> None:
    deep = partial(small, factors=[2, 2, 2], n_layers=[1] * 7)
    (verdict,) = check_model(deep(), only=["gradients"])
    assert verdict.state == "declared"
    assert verdict.found == "where outputs start at 0, the innermost blocks learn after 4 steps"
    for steps, everywhere in ((3, False), (4, True)):
        model, tokens = deep(), tokens_of(24, rows=4)
        train(model, steps, lambda: tokens)  # noqa: B023 - called at once
        model.zero_grad()
        model.objective(tokens[:, :-1], tokens[:, 1:])[0].backward()
        assert all(p.grad.any() for p in model.parameters()) == everywhere


# ---------------------------------------------------------------------- what its parts are told


class Told(Block):
    """A block that keeps what it was given."""

    def __init__(self, site: Site) -> None:
        super().__init__(site, RMSNorm, attention(), gated)
        self.site = site

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        memo = dict(carry.memo)
        carry.memo[f"layer {self.site.layer}"] = x
        self.seen = (x, carry.tokens, carry.x0, list(memo))
        return super().forward(x, carry)


def test_blocks_are_told_their_stream_and_share_a_memo_within_it_alone() -> None:
    model = shake(plain(context=13, factors=[3, 2], n_layers=[1, 1, 2, 1, 2], block=Told))
    tokens = tokens_of(13)
    model(tokens)
    site = replace(SITE, n_layers=7)
    contexts = [13, 5, 3, 3, 5, 13, 13]
    blocks = [b for blocks in model.stacks for b in blocks]
    assert [b.site for b in blocks] == [replace(site, layer=i, context=c) for i, c in enumerate(contexts)]
    assert [b.seen[3] for b in blocks] == [
        [], [], [], ["layer 2"], ["layer 1"], ["layer 0"], ["layer 0", "layer 5"]
    ]  # fmt: skip
    known = {13: tokens, 5: tokens[:, [0, 3, 6, 9, 12]], 3: tokens[:, [0, 6, 12]]}
    for told in blocks:
        x, beside, x0, _ = told.seen
        assert x.shape == x0.shape == (2, told.site.context, D)
        assert torch.equal(beside, known[told.site.context])
    for outer, inner in ((0, 5), (1, 4), (2, 3)):
        assert torch.equal(blocks[inner].seen[2], blocks[outer].seen[0])  # x0: as the stream entered


def test_poolings_and_upsamplings_are_told_theirs() -> None:
    seen = []

    def pool(site: Site, factor: int) -> nn.Module:
        seen.append(("pool", site.context, site.layer, factor))
        return AveragePool(site, factor)

    def upsample(site: Site, factor: int) -> nn.Module:
        seen.append(("upsample", site.context, site.layer, factor))
        return RepeatUpsample(site, factor)

    small(context=13, factors=[3, 2], n_layers=[1, 1, 2, 1, 2], pool=pool, upsample=upsample)
    assert seen == [("pool", 5, 1, 3), ("pool", 3, 2, 2), ("upsample", 13, 5, 3), ("upsample", 5, 4, 2)]


def test_poolings_and_upsamplings_are_given_the_tokens_of_their_streams() -> None:
    seen = []

    class Pool(AveragePool):
        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            seen.append(tokens)
            return super().forward(x, tokens)

    class Upsample(RepeatUpsample):
        def forward(self, x: Tensor, coarse: Tensor, tokens: Tensor) -> Tensor:
            assert x.shape[1] == tokens.shape[1] == coarse.shape[1] * self.factor
            seen.append(tokens)
            return super().forward(x, coarse, tokens)

    tokens = tokens_of(13)
    small(factors=[3], pool=Pool, upsample=Upsample)(tokens)
    assert torch.equal(seen[0], tokens[:, ::3])
    assert torch.equal(seen[1], F.pad(tokens, (0, 2)))


def test_dropout_acts_in_training_only() -> None:
    model, tokens = shake(small(dropout=0.3)), tokens_of(13)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_its_regions_are_all_that_lies_between() -> None:
    model = small(factors=[2, 3], n_layers=[1, 0, 2, 0, 1], token_bias=True)
    regions = nn.ModuleList(model.regions())
    around = nn.ModuleList([model.embedding, *model.readout()])
    assert len(regions) == 4 + 2 + 2
    assert {*regions.parameters()}.isdisjoint(around.parameters())
    assert count(regions.parameters()) + count(around.parameters()) == count(model.parameters())


def test_a_zero_start_leaves_the_stream_alone() -> None:
    """No block, and nothing that was pooled, is in it yet."""
    model, tokens = small(), tokens_of(13)
    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))


# ---------------------------------------------------------------------- size and cost


def resampling(d: int, k: int, biases: bool) -> int:
    """Linear pooling and upsampling, each with attention and QK-norm; two norms each, and that of the coarse stream."""
    width = d // 12 if biases else d // H
    linear = 2 * k * d * d + (d + k * d if biases else 0)
    attentions = 2 * (4 * d * d + 2 * width + 2 * d + (4 * d if biases else 0))
    return linear + attentions + d


def a_block(d: int, h: int, g: int, k: int, f: int, biases: bool) -> int:
    n = d * (h + 2 * g) * k + h * k * d + 3 * d * f + 2 * d + 2 * k
    return n + ((h + 2 * g) * k + d + 2 * f + d if biases else 0)


def test_the_number_of_parameters() -> None:
    blocks = 4 * a_block(D, 4, 2, 8, 2 * D, biases=False)
    assert count(small().parameters()) == V * D + blocks + resampling(D, 4, biases=False) + D
    deep = small(factors=[2, 3], n_layers=[1, 0, 2, 0, 1])
    folds = resampling(D, 2, biases=False) + resampling(D, 3, biases=False)
    assert count(deep.parameters()) == V * D + blocks + folds + D
    assert count(plain().parameters()) == V * D + blocks + 2 * D  # two norms


def test_the_shipped_one_has_189_817_984() -> None:
    model = built(BASELINE.name, "--config", str(MODELS["hourglass"])).model
    blocks = 15 * a_block(768, 12, 12, 64, 3072, biases=True)
    assert count(model.parameters()) == 50304 * 768 + blocks + resampling(768, 4, biases=True) + 768 == 189_817_984
    assert [len(blocks) for blocks in model.stacks] == [3, 9, 3]
    flops = count_flops(model, 1024)
    assert not flops.uncounted
    assert 1024 * flops.per_token == 3 * forward(1024, [3, 9, 3], [4], 768, 12, 12, 3072, 50304)
    assert flops.per_token == 755_868_672


def forward(
    length: int, n_layers: list[int], factors: list[int], d: int, h: int, g: int, hidden: int, vocabulary: int
) -> int:
    """FLOPs of a forward pass of a sequence, attention around linear poolings; 2 a weight, half of the pairs where causal."""
    k = d // h
    lengths = [length]
    for factor in factors:
        lengths.append(-(-lengths[-1] // factor))
    total = 2 * vocabulary * d * length
    for i, layers in enumerate(n_layers):
        t = lengths[min(i, 2 * len(factors) - i)]
        a_token = 2 * (d * (h + 2 * g) * k + d * d + 3 * d * hidden) + t * h * 2 * k
        total += layers * t * a_token
    for factor, s in zip(factors, lengths[1:], strict=True):
        fine = s * factor  # positions, those past the end included
        total += 2 * s * factor * d * d * 2  # both linear maps
        total += 2 * d * d * (2 * s + 2 * fine) + s * factor * 4 * d  # pooling: q and out a group, k and v a position
        total += 2 * d * d * (2 * fine + 2 * s) + fine * s * 2 * d  # upsampling: the other way round
    return total


@pytest.mark.parametrize(
    ("length", "n_layers", "factors"),
    [(32, [1, 2, 1], [4]), (30, [1, 2, 1], [4]), (31, [0, 1, 2, 0, 1], [3, 2]), (24, [0, 1, 1], [5])],
)
def test_flops_by_formula(length: int, n_layers: list[int], factors: list[int]) -> None:
    flops = count_flops(small(context=length, n_layers=n_layers, factors=factors), length)
    expected = forward(length, n_layers, factors, D, 4, 2, 2 * D, V)
    assert not flops.uncounted
    assert sum(flops.forward.values()) == expected
    assert sum(flops.backward.values()) == 2 * expected


# ---------------------------------------------------------------------- in training


def test_it_learns_with_terms_of_its_losses() -> None:
    """Heads of their own in the last block's place read the stream of full length."""
    model = small(factors=[2, 3], n_layers=[0, 0, 1, 0, 1], losses=[ZLoss, partial(MultiToken, n=3)])
    tokens = tokens_of(24, rows=4)
    total, parts = model.objective(tokens[:, :-1], tokens[:, 1:])
    assert {*parts} == {"loss", "z_loss", "multi_token_2", "multi_token_3"}
    assert total.item() == pytest.approx(sum(part.item() for part in parts.values()))
    losses = train(model, 30, lambda: tokens)
    assert losses[-1] < losses[0] - 1.0
    after = model.objective(tokens[:, :-1], tokens[:, 1:])[1]
    assert all(after[name] < parts[name] - 1.0 for name in ("multi_token_2", "multi_token_3"))


def gradients(model: Hourglass) -> list[Tensor]:
    total, _ = model.train().objective(*batch(model))
    return [total.detach(), *torch.autograd.grad(total, [*model.parameters()])]


def test_recomputing_its_regions_changes_nothing() -> None:
    nested = partial(small, factors=[2, 3], n_layers=[1, 1, 1, 1, 1])
    kept, again = shake(nested()), nested(memory=RecomputeBlocks())
    again.load_state_dict(kept.state_dict())
    again.apply_memory_policy()
    assert all(type(region).__name__.startswith("Recomputed") for region in again.regions())
    assert all(torch.equal(a, b) for a, b in zip(gradients(kept), gradients(again), strict=True))


def test_generation_at_any_length() -> None:
    model = shake(small(), 0.2).eval()
    new = model.generate(tokens_of(1), 20, temperature=0)
    assert torch.equal(new[:, 1:], model(new[:, :-1]).argmax(-1))


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factors": []}, r"model\.factors: \[\] \(expected one or more, of 2 or more each\)"),
        ({"factors": [1]}, r"model\.factors: \[1\] \(expected one or more, of 2"),
        ({"factors": [2, 0], "n_layers": [1] * 5}, r"model\.factors: \[2, 0\]"),
        ({"factors": [T]}, r"model\.factors: \[32\] leave one position of 32 tokens"),
        ({"factors": [8, 4], "n_layers": [1] * 5}, r"model\.factors: \[8, 4\] leave one position of 32 tokens"),
        ({"n_layers": [1, 1]}, r"model\.n_layers: \[1, 1\], 2 numbers \(expected 3: before"),
        ({"factors": [2, 2]}, r"model\.n_layers: \[1, 2, 1\], 3 numbers \(expected 5"),
        ({"n_layers": [1, 1, 0]}, r"model\.n_layers: \[1, 1, 0\] \(expected 0 or more each, and 1 or more as the last"),
        ({"n_layers": [-1, 1, 1]}, r"model\.n_layers: \[-1, 1, 1\] \(expected 0 or more"),
        ({"pool": None}, r"model\.pool: empty"),
        ({"upsample": None}, r"model\.upsample: empty"),
        ({"norm": None}, r"model\.norm: empty"),
        ({"block": None}, r"model\.block: empty"),
        ({"dropout": 1.0}, r"model\.dropout: 1\.0"),
        ({"d_model": 0}, r"model\.d_model: 0 \(expected 1"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_too_long_an_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: 33 a sequence \(context 32\); fix"):
        small()(tokens_of(33))
