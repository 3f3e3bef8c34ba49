"""MegaByte: every prediction from its own prefix alone, what a shift forgotten would do, sizes and FLOPs by formula."""

from functools import partial

import pytest
import torch
from helpers import SITE, V, adamw, attention, batch, block, gated, qk_norm, shake
from shipped import MODELS, built
from torch import Tensor

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.megabyte import MegaByte
from blagpt_pl.nn.activation import GELU
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import MLP
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing import check_model
from blagpt_pl.testing.promises import check_causal, check_responsive, influence

D, E, P = 32, 16, 4  # global width, local width, tokens of a patch
own_block = block(attention=attention(head_dim=8))
plain = block(
    attention=attention(n_kv_heads=None, head_dim=8, edits=[qk_norm, RoPE]), mlp=partial(MLP, activation=GELU)
)


def small(kind: type[MegaByte] = MegaByte, **changes: object) -> MegaByte:
    """A small MegaByte; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": SITE.context, "d_model": D, "d_local": E, "patch": P, "n_layers": 2, "n_local_layers": 2,
        "block": own_block, "norm": RMSNorm, "head": TiedHead, "init": GPT2Init(zero_outputs=True), "optimizer": adamw,
        "schedule": Constant,
    }  # fmt: skip
    return kind(**{**arguments, **changes})


# ---------------------------------------------------------------------- what it computes


def prediction(model: MegaByte, prefix: Tensor) -> Tensor:
    """(t + 1,) tokens -> (V,): the logits after them, from nothing else and without padding, shift or batch."""
    size, s = model.patch, len(prefix)
    k, j = divmod(s, size)
    h = [model.patch_start.vector]
    for i in range(k):
        h.append(torch.cat([model.patch_embedding.weight[x] for x in prefix[i * size : (i + 1) * size]]))
    h = torch.stack(h)[None]  # (1, k + 1, D)
    if model.positions is not None:
        h = h + model.positions.table.weight[: k + 1]
    for one in model.blocks:
        h = one(h, Carry(torch.zeros(1, k + 1, dtype=torch.int64), h))
    slices = h[0, k].chunk(size)
    y = [model.start.vector] + [model.embedding.weight[x] for x in prefix[k * size :]]
    y = torch.stack([row + model.spread.weight @ part for row, part in zip(y, slices, strict=False)])[None]
    if model.local_positions is not None:
        y = y + model.local_positions.table.weight[: j + 1]
    for one in model.local_blocks:
        y = one(y, Carry(torch.zeros(1, j + 1, dtype=torch.int64), y))
    y = model.norm(y[0, -1])
    return model.head(y if model.token_bias is None else y + model.token_bias.weight[prefix[-1]])


@pytest.mark.parametrize(
    ("patch", "changes"),
    [
        (2, {}),
        (4, {"positions": LearnedPositions, "token_bias": True, "local_block": plain}),
        (8, {"head": LinearHead, "block": plain}),
    ],
)
def test_every_prediction_is_made_from_its_prefix_alone(patch: int, changes: dict) -> None:
    model = shake(small(patch=patch, **changes), 0.1).double()
    tokens, _ = batch(model, size=2, length=19)
    weights = torch.randn(2, 19, V, dtype=torch.float64)
    expected = torch.stack([torch.stack([prediction(model, row[: t + 1]) for t in range(19)]) for row in tokens])
    found = []
    for logits in (model(tokens), expected):
        gradients = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        found.append([logits, *gradients])
    assert found[0][0].std() > 0.1
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-10


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 31, 32])
def test_any_length_runs(length: int) -> None:
    model = shake(small()).eval()
    tokens, _ = batch(model, length=length)
    assert model(tokens).shape == (3, length, V)
    assert (model(tokens)[:, -1] - model.next_logits(tokens)).abs().max() < 1e-6


class Unshifted(MegaByte):
    """The patches reach the global model one place too early."""

    def global_stream(self, tokens: Tensor, known: Tensor) -> Tensor:
        tokens = torch.nn.functional.pad(tokens, (0, known.shape[1] * self.patch - tokens.shape[1]))
        x = self.patch_embedding(tokens).unflatten(1, (-1, self.patch)).flatten(2)
        for one in self.blocks:
            x = one(x, Carry(known, x))
        return x


class LateLocal(MegaByte):
    """The outputs are taken where they stand, not one place later: the last token of every prefix is not seen."""

    def finish(self, x: Tensor, carry: Carry, block: torch.nn.Module | None = None) -> Tensor:
        tokens = carry.memo["tokens"]
        y = self.local_blocks[-1](x, carry).reshape(len(tokens), -1, x.shape[-1])
        return self.ended(y[:, : tokens.shape[1]], tokens)


def test_a_forgotten_shift_is_noticed() -> None:
    one, other = torch.randint(V, (2, 23), generator=torch.Generator().manual_seed(1))
    for kind in (MegaByte, Unshifted, LateLocal):
        model = shake(small(kind), 0.1).double().eval()
        moved = influence(model, one, torch.where(one == other, (one + 1) % V, other))
        early, own = moved.tril(-1).max(), moved.diagonal().min()
        assert (early > 1e-6) == (kind is Unshifted)
        assert (own < 1e-6) == (kind is LateLocal)
        if kind is MegaByte:
            check_causal(moved, "MegaByte")
            check_responsive(moved, "MegaByte")
            assert early == 0 and moved[0, 0] > 1e-4  # the very first token is seen, and at once


def test_promises() -> None:
    check_model(
        small(
            context=25,
            patch=5,
            d_model=40,
            local_block=plain,
            positions=LearnedPositions,
            token_bias=True,
            dropout=0.1,
            losses=[partial(ZLoss, weight=1e-3), partial(MultiToken, n=2)],
        ),
        only={"causality", "gradient causality", "objective", "slopes", "gradients", "accumulation", "batch", "prefix"},
    )


def test_more_tokens_are_predicted_than_a_patch_has() -> None:
    """What further heads may predict is the sequence's; their blocks are local ones, and know a patch."""
    model = small(losses=[partial(MultiToken, n=P + 2)], local_block=plain)
    (term,), last = model.losses, model.local_blocks[-1]
    assert [b.attention.part.heads for b in term.blocks] == [last.attention.part.heads] * (P + 1)
    _, parts = model.objective(*batch(model))
    assert len(parts) == P + 2
    with pytest.raises(ValueError, match=r"MultiToken\.n: 33 \(expected 1 to 32, the context\)"):
        small(losses=[partial(MultiToken, n=33)])


def test_parts_of_a_stream_are_told_the_last_token_known_there() -> None:
    seen = []

    class Probe(MLP):
        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            seen.append(carry.tokens)
            assert carry.x0.shape == x.shape
            return super().forward(x, carry)

    model = small(block=block(attention=attention(head_dim=8), mlp=partial(Probe, activation=GELU)), n_layers=1)
    model(torch.arange(1, 11)[None])
    assert seen[0].tolist() == [[0, 4, 8]]
    assert seen[1].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]


# ---------------------------------------------------------------------- sizes


def parameters(v: int, d: int, e: int, p: int, n: tuple[int, int], hk: int, f: int, tied: bool) -> int:
    """V (D / P + E (2 if untied)) + D + E + E D / P + Σ over both models of L [4 w H K + 2 F w² + 2 w + 2 K] + E, plain blocks."""

    def blocks(layers: int, w: int, k: int) -> int:
        return layers * (4 * w * hk + 2 * f * w * w + 2 * w + 2 * k)

    k = 64 if hk == 768 else 8
    return v * (d // p + e * (1 if tied else 2)) + d + e + e * d // p + blocks(n[0], d, k) + blocks(n[1], e, k) + e


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_by_formula(tied: bool) -> None:
    model = small(block=plain, head=TiedHead if tied else LinearHead, n_layers=3)
    assert count(model.parameters()) == parameters(V, D, E, P, (3, 2), 32, 4, tied)


def test_the_shipped_one_has_the_size_it_says() -> None:
    file = MODELS["megabyte"]
    model = built("blagpt.yaml", "--config", str(file)).model
    n = count(model.parameters())
    assert n == parameters(50304, 768, 256, 4, (10, 2), 768, 4, tied=False) == 108_882_688
    assert f"{n:,}" in file.read_text()


@pytest.mark.parametrize("length", [16, 23, 32])
def test_flops_by_formula(length: int) -> None:
    """Places, not tokens, pass through the blocks: K patches of the global model, K P slots of the local one."""
    model, k = small(block=gated_block(), n_layers=3, head=LinearHead), length // P + 1

    def blocks(layers: int, w: int, rows: int, positions: int) -> int:
        products = 2 * rows * (w * (4 + 2 * 2) * 8 + 4 * 8 * w + 3 * w * 2 * w)  # q, k, v; back; gate, up, down
        return layers * (products + rows * positions * 4 * 2 * 8)  # scores and values, half of the pairs, 2 each

    forward = blocks(3, D, k, k) + blocks(2, E, k * P, P) + 2 * k * P * (D // P) * E + 2 * length * E * V
    found = count_flops(model, length)
    assert not found.uncounted
    assert sum(found.forward.values()) == forward
    assert sum(found.backward.values()) == 2 * forward


def gated_block() -> partial:
    return block(attention=attention(head_dim=8), mlp=gated)


# ---------------------------------------------------------------------- use


def test_it_learns_and_generates_bytes() -> None:
    model = small(vocab_size=257, context=48)
    text = torch.tensor([list(b"the cat sat on the mat; " * 3)[:49]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        total, parts = model.objective(text[:, :48], text[:, 1:])
        total.backward()
        optimizer.step()
    assert parts["loss"] < 0.2
    assert bytes(model.generate(text[:, :24], 10, temperature=0)[0].tolist()) == b"the cat sat on the mat; the cat sa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 1}, r"model.patch: 1 \(expected 2 or more"),
        ({"patch": 17}, r"model.patch: 17 \(expected .* two patches within the context of 32\)"),
        ({"d_model": 33}, "model.d_model: 33 does not split into 4 tokens"),
        ({"d_local": 0}, r"model.d_local: 0 \(expected 1 or more\)"),
        ({"n_local_layers": 0}, r"model.n_local_layers: 0 \(expected 1 or more\)"),
        ({"local_block": lambda site: 3}, "model.local_block: int is not"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_too_long_an_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: 33 a sequence \(context 32\)"):
        small()(torch.zeros(1, 33, dtype=torch.int64))
