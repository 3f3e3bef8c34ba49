"""Multi-token prediction is a plain loop over its heads, in value and in every gradient, and holds one head at a time."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import D, T, V, batch, block, check_variant, shake, tiny
from test_next_token import Memory
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken, ahead, plus
from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import Carry, Site, count
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.head import LinearHead, TiedHead


class Leaves(Block):
    """A block that reads x0, reads what the blocks below it left, and leaves something itself."""

    def __init__(self, site: Site, **arguments: object) -> None:
        super().__init__(site, **arguments)
        self.mix = nn.Linear(3 * site.d_model, site.d_model)
        self.layer = site.layer

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        below = carry.memo.get("below", torch.zeros_like(x))
        carry.memo["below"] = below + x.tanh()
        carry.memo[f"place {self.layer}"] = torch.arange(x.shape[1])  # needs no gradient
        return super().forward(x + self.mix(torch.cat([x, carry.x0, below], -1)), carry)


def heads(n: int) -> list[Callable]:
    return [partial(MultiToken, n=n)]


def model_of(n: int = 4, double: bool = True, **changes: object) -> BlaGPT:
    """A model with n heads, off its start."""
    model = shake(tiny(losses=heads(n), **changes))
    return model.double() if double else model


def masked(targets: Tensor) -> Tensor:
    """Some targets count nowhere."""
    return targets.masked_fill(torch.rand(targets.shape, generator=torch.Generator().manual_seed(5)) < 0.2, IGNORE)


def twin(model: BlaGPT, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """The losses of all heads, the model's own first: a loop over tokens ahead, all logits at once, plain autograd."""
    losses = []
    own_blocks = [model.blocks[-1], *(model.losses[0].blocks if len(model.losses) else [])]
    trunk, carry = model.trunk(tokens)
    for i, last in enumerate(own_blocks, 1):
        x = model.norm(last(trunk, Carry(tokens, carry.x0, dict(carry.memo))))
        if model.token_bias is not None:
            x = x + model.token_bias(tokens)
        logits = model.head(x)  # (B, T, V)
        rows, length = [], tokens.shape[1]
        for t in range(length):
            if t + i - 1 < length:  # x_{t+i} is known
                rows.append((logits[:, t], targets[:, t + i - 1]))
        losses.append(F.cross_entropy(torch.cat([z for z, _ in rows]), torch.cat([y for _, y in rows])))
    return losses


def gradients(model: BlaGPT, total: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_equal(mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None], tolerance: float = 1e-10) -> None:
    assert mine.keys() == theirs.keys()
    for name, a in mine.items():
        b = theirs[name]
        assert (a is None) == (b is None), name
        assert a is None or (a - b).abs().max() < tolerance, name


# ---------------------------------------------------------------------- the twin

VARIANTS = {
    "baseline": {},
    "untied": {"head": partial(LinearHead, bias=True)},
    "token bias": {"token_bias": True},
    "capped": {"head": partial(TiedHead, softcap=3.0)},
    "memo and x0": {"block": partial(Leaves, **block().keywords), "n_layers": 3},
    "one layer": {"block": partial(Leaves, **block().keywords), "n_layers": 1},
    "dropout": {"dropout": 0.2, "block": block(dropout=0.2)},
}


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_equals_its_twin(changes: dict, n: int) -> None:
    model = model_of(n, **changes).train()
    tokens, targets = batch(model)
    targets = masked(targets)
    torch.manual_seed(7)
    total, parts = model.objective(tokens, targets)
    mine = gradients(model, total)
    torch.manual_seed(7)
    losses = twin(model, tokens, targets)
    theirs = gradients(model, sum(losses))
    assert list(parts) == ["loss", *(f"multi_token_{i}" for i in range(2, n + 1))]
    assert all(abs(a - b) < 1e-10 for a, b in zip(parts.values(), losses, strict=True))
    assert abs(total - sum(losses)) < 1e-10
    assert not any(part.requires_grad for part in parts.values())
    assert_equal(mine, theirs)
    assert all(g is not None and g.any() for g in mine.values())


def test_the_comparison_would_see_a_head_that_is_left_out() -> None:
    model = model_of(3)
    tokens, targets = batch(model)
    mine = gradients(model, model.objective(tokens, targets)[0])
    losses = twin(model, tokens, targets)
    theirs = gradients(model, losses[0] + losses[1])
    assert theirs["losses.0.blocks.1.mlp.part.down.weight"] is None
    assert (mine["blocks.0.mlp.part.down.weight"] - theirs["blocks.0.mlp.part.down.weight"]).abs().max() > 1e-4


def test_heads_do_not_see_what_the_last_block_or_one_another_leaves() -> None:
    """Each stands in the last block's place: it gets the memo as that one got it."""
    seen = []

    class Watch(Leaves):
        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            seen.append((self.layer, sorted(carry.memo)))
            return super().forward(x, carry)

    model = model_of(3, n_layers=2, block=partial(Watch, **block().keywords))
    model.objective(*batch(model))
    assert seen == [(0, []), *[(1, ["below", "place 0"])] * 3]


def test_two_backwards_accumulate() -> None:
    model = model_of(3)
    tokens, targets = batch(model)
    for _ in range(2):
        (model.objective(tokens, targets)[0] / 2).backward()
    mine = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(mine, gradients_of_twin(model, tokens, targets))


def gradients_of_twin(model: BlaGPT, tokens: Tensor, targets: Tensor) -> dict[str, Tensor | None]:
    other = copy.deepcopy(model)
    return gradients(other, sum(twin(other, tokens, targets)))


@pytest.mark.parametrize("frozen", ["head", "norm", "embedding", "blocks", "losses"])
def test_what_is_frozen_receives_nothing_and_the_rest_the_same(frozen: str) -> None:
    model = model_of(3, head=LinearHead)
    getattr(model, frozen).requires_grad_(False)
    tokens, targets = batch(model)
    mine = gradients(model, model.objective(tokens, targets)[0])
    assert_equal(mine, gradients_of_twin(model, tokens, targets))
    assert all(g is None for name, g in mine.items() if name.startswith(frozen + "."))
    assert any(g is not None for g in mine.values())


def test_without_gradients_the_values_are_the_same() -> None:
    model = model_of(3)
    tokens, targets = batch(model)
    total, parts = model.objective(tokens, targets)
    with torch.no_grad():
        alone, same = model.objective(tokens, targets)
    assert not alone.requires_grad
    assert torch.equal(alone, total)
    assert same == parts
    model.requires_grad_(False)
    assert torch.equal(model.objective(tokens, targets)[0], total)


def test_without_gradients_none_is_made() -> None:
    """Nothing is differentiable: measuring, or a model that is frozen."""
    model, seen = model_of(3), []
    for b in model.losses[0].blocks:
        b.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    model.objective(*batch(model))
    with torch.no_grad():
        model.objective(*batch(model))
    model.requires_grad_(False)
    model.objective(*batch(model))
    assert seen == [True] * 2 + [False] * 4


def test_a_second_derivative_is_refused() -> None:
    model = model_of(2)
    tokens, targets = batch(model)
    trunk, carry = model.trunk(tokens)
    total, _ = model.losses[0](model, trunk, carry, targets)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(total * trunk.sum(), [trunk], create_graph=True)


def test_under_bf16_autocast() -> None:
    """As exact as the twin under autocast, measured from float32; gradients keep their parameters' dtype."""
    model = model_of(4, double=False)
    tokens, targets = batch(model)
    exact = gradients_of_twin(model, tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        mine = gradients(model, model.objective(tokens, targets)[0])
        theirs = gradients_of_twin(model, tokens, targets)
    for name, reference in exact.items():
        assert mine[name].dtype == torch.float32
        errors = [(g[name] - reference).abs().max() / reference.abs().max() for g in (mine, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-3, name


def test_16_bit_gradients_add_up_in_float32() -> None:
    total = None
    for piece in (1.0, *[2**-9] * 4):  # each of which bfloat16 would drop: its next number is 1 + 2^-7
        total = plus(total, torch.tensor(piece, dtype=torch.bfloat16))
    assert total.item() == 1 + 2**-7
    assert plus(None, None) is None
    one = torch.ones((), dtype=torch.float64)
    assert [plus(a, b).dtype for a, b in ((one, None), (None, one), (one, one))] == [torch.float64] * 3


def test_a_bf16_model_rounds_the_sum_over_its_heads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, by_head = model_of(4, double=False).bfloat16(), []
    original = MultiToken.one_head

    def one_head(*args: object) -> tuple:
        by_head.append(original(*args))
        return by_head[-1]

    monkeypatch.setattr(MultiToken, "one_head", staticmethod(one_head))
    tokens, targets = batch(model)
    trunk, carry = model.trunk(tokens)
    trunk = trunk.detach().requires_grad_()
    total, _ = model.losses[0](model, trunk, carry, targets)
    (mine,) = torch.autograd.grad(total, [trunk])
    pieces = [grads[0] for _, grads in by_head]  # the trunk's stands first
    assert [g.dtype for g in pieces] == [torch.bfloat16] * 3
    assert torch.equal(mine, sum(g.float() for g in pieces).bfloat16())
    assert not torch.equal(mine, sum(pieces))


def test_in_float16_the_gradients_of_a_mean_over_many_tokens_do_not_vanish() -> None:
    """They are made before a scaler has enlarged them; a mean's, over 2048 tokens of a quiet head, would be all but gone."""
    model = model_of(3, double=False)
    with torch.no_grad():
        model.embedding.weight.mul_(0.01)
    tokens, targets = batch(model, size=64, length=T)
    parameters = list(model.losses[0].blocks.parameters())

    def made(half: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16, enabled=half):
            total, _ = model.losses[0](model, *model.trunk(tokens), targets)
        return torch.autograd.grad(total, parameters)

    exact = made(False)
    assert max((a - b).norm() / b.norm() for a, b in zip(made(True), exact, strict=True)) < 1e-2
    largest = max(g.abs().max() for g in exact) / targets.numel()
    assert largest < 2**-14  # numbers of one token are subnormal in float16


# ---------------------------------------------------------------------- targets


def test_targets_ahead() -> None:
    targets = torch.tensor([[1, 2, IGNORE, 4, 5]])
    assert ahead(targets, 1).tolist() == [[2, IGNORE, 4, 5, IGNORE]]
    assert ahead(targets, 4).tolist() == [[5, IGNORE, IGNORE, IGNORE, IGNORE]]
    assert ahead(targets, 7).tolist() == [[IGNORE] * 5]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_nothing_wraps_around(steps: int) -> None:
    """The first targets, which a wrong shift would bring to the end, move only the heads they belong to."""
    model = model_of(4)
    tokens, targets = batch(model)
    other = targets.clone()
    other[:, :steps] = (other[:, :steps] + 1) % V
    before, after = (model.objective(tokens, y)[1] for y in (targets, other))
    name = f"multi_token_{steps + 1}"  # its first target is the one at `steps`
    assert torch.equal(before[name], after[name])
    assert before["loss"] != after["loss"]
    other[:, steps] = (other[:, steps] + 1) % V
    assert model.objective(tokens, other)[1][name] != before[name]


@pytest.mark.parametrize("i", [2, 3, 4])
def test_a_head_does_not_look_ahead(i: int) -> None:
    """Its logits at t have no gradient by the embeddings of tokens after t, and one by each up to t."""
    model = model_of(4)
    tokens, _ = batch(model, size=1, length=9)
    kept = []
    model.embedding.register_forward_hook(lambda module, args, out: kept.append(out))
    trunk, carry = model.trunk(tokens)
    logits = model.head(model.finish(trunk, carry, model.losses[0].blocks[i - 2]))
    for t in range(9):
        (g,) = torch.autograd.grad(logits[0, t].square().sum(), kept, retain_graph=True)
        reach = g[0].abs().amax(-1) > 0
        assert reach.tolist() == [s <= t for s in range(9)]


# ---------------------------------------------------------------------- the baseline


def test_one_token_is_the_baseline_bit_for_bit() -> None:
    results = []
    for losses in (None, heads(1)):
        torch.manual_seed(3)
        model = tiny(losses=losses, dropout=0.1).train()
        total, parts = model.objective(*batch(model))
        total.backward()
        state = dict(model.state_dict())
        results.append((state, total, parts, [p.grad for p in model.parameters()], torch.rand(3)))
    (mine, *rest), (theirs, *others) = results
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(rest[0], others[0])
    assert rest[1] == others[1]
    assert all(torch.equal(a, b) for a, b in zip(rest[2], others[2], strict=True))
    assert torch.equal(rest[3], others[3])
    assert tiny(losses=heads(1)).flops_per_token() == tiny().flops_per_token()


def test_the_first_head_the_ruler_and_generation_are_the_baselines() -> None:
    """Whatever the further heads hold; without them the model is the one to use."""
    model, plain = model_of(4), tiny().double()
    state = {name: p for name, p in model.state_dict().items() if not name.startswith("losses.")}
    plain.load_state_dict(state)
    tokens, targets = batch(model)
    for _ in range(2):
        assert abs(model.objective(tokens, targets)[1]["loss"] - plain.objective(tokens, targets)[0]) < 1e-12
        assert torch.equal(model.measure(tokens, targets), plain.measure(tokens, targets))
        assert torch.equal(model(tokens), plain(tokens))
        drawn = [m.generate(tokens[:, :4], 6, generator=torch.Generator().manual_seed(1)) for m in (model, plain)]
        assert torch.equal(*drawn)
        shake(model.losses, std=10.0)


@pytest.mark.parametrize("n", [0, -1, T + 1])
def test_a_number_of_tokens_that_makes_no_sense_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"MultiToken.n: {n} \(expected 1 to {T}, the context\)"):
        tiny(losses=heads(n))


def test_a_sequence_shorter_than_n_is_told() -> None:
    model = model_of(4)
    tokens, targets = batch(model, length=4)
    assert model.objective(tokens, targets)[0].isfinite()
    with pytest.raises(ValueError, match="MultiToken.n: 4 tokens to predict, but only 3 a sequence"):
        model.objective(tokens[:, :3], targets[:, :3])


def test_the_longest_n_leaves_one_target() -> None:
    model = model_of(T, n_layers=1, double=False)
    assert all(part.isfinite() for part in model.objective(*batch(model, length=T))[1].values())


def test_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="model.losses: 2 terms named multi_token"):
        tiny(losses=[*heads(2), *heads(3)])


def test_beside_z_loss() -> None:
    """z-loss reads the logits of the next-token loss alone."""
    model = shake(tiny(losses=[*heads(3), ZLoss])).double()
    tokens, targets = batch(model)
    total, parts = model.objective(tokens, targets)
    losses = twin(model, tokens, targets)
    z = 1e-4 * model(tokens).logsumexp(-1).square().mean()
    assert sorted(parts) == ["loss", "multi_token_2", "multi_token_3", "z_loss"]
    assert_equal(gradients(model, total), gradients(model, sum(losses) + z))


def test_its_size_and_flops() -> None:
    """Each further head: a block, D V multiply-adds of the unembedding, and what a block's attention reads."""
    model, plain = model_of(4), tiny()
    one = count(plain.blocks[-1].parameters())
    assert count(model.parameters()) == count(plain.parameters()) + 3 * one
    h, g, k, f = 4, 2, 8, 64
    products = D * (h + 2 * g) * k + h * k * D + 3 * D * f + V * D
    reading = plain.blocks[-1].attention.part.core.flops_per_token(T)
    assert model.flops_per_token() == plain.flops_per_token() + 3 * (6 * products + 3 * reading)


def test_its_blocks_start_and_are_told_like_the_last_one() -> None:
    model = tiny(losses=heads(3), n_layers=3, block=partial(Leaves, **block().keywords))
    extra = model.losses[0].blocks
    assert [b.layer for b in extra] == [2, 2]
    assert all(not b.mlp.part.down.weight.any() for b in extra)  # zero_outputs
    assert not torch.equal(extra[0].mlp.part.gate_up.weight, extra[1].mlp.part.gate_up.weight)
    roles = model.parameter_roles()
    assert roles["losses.0.blocks.1.mlp.part.down.weight"] == "matrix"


def test_promises() -> None:
    check_variant(tiny(losses=heads(3)))


def test_it_learns_the_tokens_ahead() -> None:
    """On a sequence that counts upwards every head's loss falls far below ln V."""
    model = tiny(losses=heads(3))
    tokens = (torch.arange(T + 1) + torch.arange(8)[:, None] * 7) % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        total, parts = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
    assert max(parts.values()) < 1


# ---------------------------------------------------------------------- memory


def peak(n: int, loss: Callable, autocast: bool = False) -> tuple[int, int]:
    """Most bytes alive in forward and backward with n heads, and the bytes of one head's block."""
    torch.manual_seed(0)
    model = tiny(losses=heads(n))
    tokens, targets = batch(model, size=16, length=T)
    with Memory() as memory, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss(model, tokens, targets).backward()
    return memory.peak, 4 * count(model.blocks[-1].parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_memory_does_not_grow_with_the_number_of_heads(autocast: bool) -> None:
    """Beyond the stored gradients of the heads' own blocks and their copies in backward; the twin's does."""
    (two, one), (five, _) = (peak(n, lambda m, x, y: m.objective(x, y)[0], autocast) for n in (2, 5))
    (naive_two, _), (naive_five, _) = (peak(n, lambda m, x, y: sum(twin(m, x, y)), autocast) for n in (2, 5))
    assert five - two < 3 * 3 * one
    assert naive_five - naive_two > 10 * (five - two)


class Straight(nn.Linear):
    """A block that multiplies the stream as it comes, without a norm before."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x)


def test_autocast_keeps_no_cast_of_the_trunk() -> None:
    """Until it ends it would keep one of each leaf that a matrix product reads, here of two bytes a number."""
    alive = []
    for size in (16, 48):
        torch.manual_seed(0)
        model = tiny(losses=heads(3))
        model.losses[0].blocks = nn.ModuleList(Straight(D, D) for _ in range(2))
        tokens, targets = batch(model, size=size, length=T)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            trunk, carry = model.trunk(tokens)
        trunk.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16), Memory() as memory:
            total = model.losses[0](model, trunk, carry, targets)
            alive.append(memory.live)
        del total
    assert abs((alive[1] - alive[0]) / (32 * T * D) - 12) < 0.1  # the trunk, x0 and the trunk's gradient, float32


# ---------------------------------------------------------------------- compiled


def test_compiled_it_is_the_same() -> None:
    changes = {"token_bias": True, "n_layers": 3}
    eager, compiled = (model_of(3, compile=backend, **changes) for backend in (None, "aot_eager"))
    compiled.load_state_dict(eager.state_dict())
    compiled.configure_model()
    assert all(b._compiled_call_impl is not None for b in compiled.losses[0].blocks)
    tokens, targets = batch(eager)
    results = [model.objective(tokens, targets) for model in (eager, compiled)]
    assert abs(results[0][0] - results[1][0]) < 1e-10
    assert_equal(*(gradients(m, total) for m, (total, _) in zip((eager, compiled), results, strict=True)))
