"""z-loss is its formula, in value and in every gradient, on the tokens that count; and the ruler never sees it."""

import math
from functools import partial

import pytest
import torch
from helpers import SITE, D, V, batch, block, check_variant, shake, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blagpt_pl.losses.chunked import Chunked
from blagpt_pl.losses.next_token import IGNORE, full
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.nn.head import LinearHead, TiedHead

HEADS = {
    "tied": TiedHead,
    "linear with bias": partial(LinearHead, bias=True),
    "capped": partial(LinearHead, bias=True, softcap=3.0),
}


def term(weight: float = 1e-4) -> ZLoss:
    return ZLoss(SITE, block(), weight)


def problem(head: str, shape: tuple[int, ...] = (3, 17), shift: float = 0.0) -> tuple[nn.Module, Tensor, Tensor]:
    """A head, features (..., D) that are a leaf, and targets of which some count nowhere; float64."""
    torch.manual_seed(0)
    module = HEADS[head](SITE, nn.Embedding(V, D)).double()
    features = (torch.randn(*shape, D, dtype=torch.float64) + shift).requires_grad_()
    targets = torch.randint(V, shape)
    targets[torch.rand(shape) < 0.3] = IGNORE
    targets.view(-1)[0] = 5  # one that counts
    return module, features, targets


def formula(module: nn.Module, features: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Next-token loss and z-loss, token by token, from exponentials alone."""
    nats, squares = [], []
    for h, y in zip(features.flatten(0, -2), targets.flatten().tolist(), strict=True):
        if y != IGNORE:
            e = module(h).exp()
            nats.append(e.sum().log() - e[y].log())
            squares.append(e.sum().log() ** 2)
    return sum(nats) / len(nats), weight * sum(squares) / len(squares)


def gap(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("weight", [1e-4, 0.3])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("chunk", [7, 8192])
def test_it_is_its_formula_and_its_twin(head: str, chunk: int, weight: float) -> None:
    module, features, targets = problem(head)
    z = term(weight)
    inputs = [features, *module.parameters()]
    mine, parts = Chunked(chunk).parts(module, features, targets, [z])
    nats, squares = formula(module, features, targets, weight)
    twin = full(module, features, targets, [z])
    gradients = [torch.autograd.grad(total, inputs) for total in (mine, nats + squares, twin)]
    assert gap([mine, *parts], [nats + squares, nats, squares]) < 1e-10
    assert abs(mine - twin) < 1e-10
    assert gap(gradients[0], gradients[1]) < 1e-10
    assert gap(gradients[0], gradients[2]) < 1e-10
    plain = torch.autograd.grad(full(module, features, targets), inputs)
    assert gap(gradients[0], plain) > 1e-3 * weight  # what is compared is not the next-token loss alone


@settings(deadline=None, max_examples=20)
@given(st.floats(-30, 30), st.floats(1e-6, 10.0))
def test_a_shift_of_all_logits_moves_it_alone(shift: float, weight: float) -> None:
    """log Z moves by the shift, below zero too, and the next-token loss not at all."""
    logits, targets = torch.randn(9, V, dtype=torch.float64), torch.randint(V, (9,))
    log_z = logits.exp().sum(-1).log() + shift
    assert torch.allclose(term(weight)(logits + shift, targets), weight * log_z**2, rtol=1e-9, atol=1e-12)


def test_a_negative_log_z_counts() -> None:
    """A uniform distribution over V with logits -c: log Z = ln V - c, and its gradient lifts the logits."""
    logits = torch.full((4, V), -20.0, requires_grad=True)
    value = term(1.0)(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(value, torch.full((4,), (math.log(V) - 20) ** 2))
    (gradient,) = torch.autograd.grad(value.sum(), [logits])
    assert (gradient < 0).all()


def test_targets_that_count_nowhere_have_none() -> None:
    module, features, targets = problem("capped")
    z = term(0.1)
    values = z(module(features).flatten(0, -2), targets.flatten())
    assert not values[targets.flatten() == IGNORE].any()
    assert values[targets.flatten() != IGNORE].all()
    results = []
    for _ in range(2):
        total, parts = Chunked(8).parts(module, features, targets, [z])
        results.append([total, *parts, *torch.autograd.grad(total, [features, *module.parameters()])])
        with torch.no_grad():
            features[targets == IGNORE] = 7.0
    assert gap(*results) < 1e-12
    assert not results[1][3][targets == IGNORE].any()


def test_it_is_made_in_float32() -> None:
    """Of bf16 logits that are the same numbers, the same value as of float32 ones."""
    logits, targets = (50 * torch.randn(9, V)).bfloat16(), torch.randint(V, (9,))
    value = term()(logits, targets)
    assert value.dtype == torch.float32
    assert torch.equal(value, term()(logits.float(), targets))


@pytest.mark.parametrize("weight", [0.0, -1e-4, math.nan, math.inf])
def test_a_weight_that_makes_no_sense_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"ZLoss.weight: .* \(expected above 0; to do without it, leave ZLoss out\)"):
        term(weight)


def test_the_same_term_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="model.losses: 2 terms named z_loss"):
        tiny(losses=[ZLoss, ZLoss])


def test_a_part_that_is_no_term_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.losses\[1\]: Linear is no loss term"):
        tiny(losses=[ZLoss, lambda site, block: nn.Linear(2, 2)])


def test_a_model_trains_on_it_and_is_measured_without() -> None:
    with_it, without = shake(tiny(losses=[partial(ZLoss, weight=0.1)])).double(), shake(tiny()).double()
    tokens, targets = batch(without)
    without.load_state_dict(with_it.state_dict())
    total, parts = with_it.objective(tokens, targets)
    plain, only = without.objective(tokens, targets)
    assert list(parts) == ["loss", "z_loss"]
    assert list(only) == ["loss"]
    log_z = without(tokens).logsumexp(-1)
    assert abs(parts["loss"] - plain) < 1e-10
    assert abs(parts["z_loss"] - 0.1 * (log_z**2).mean()) < 1e-10
    assert abs(total - sum(parts.values())) < 1e-12
    assert parts["z_loss"] > 0.1
    assert not any(part.requires_grad for part in parts.values())
    assert torch.equal(with_it.measure(tokens, targets), without.measure(tokens, targets))
    oracle = plain_autograd(without, tokens, targets, 0.1)
    total.backward()
    assert gap([p.grad for p in with_it.parameters()], oracle) < 1e-10


def plain_autograd(model: nn.Module, tokens: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, ...]:
    """Gradients of all parameters, through all logits at once."""
    logits = model(tokens)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return torch.autograd.grad(loss + weight * logits.logsumexp(-1).square().mean(), list(model.parameters()))


def test_it_pulls_log_z_towards_zero() -> None:
    """And ten steps with a heavy weight move |log Z| further than ten without."""
    means = []
    for losses in ([], [partial(ZLoss, weight=1.0)]):
        torch.manual_seed(0)
        model = shake(tiny(losses=losses))
        tokens, targets = batch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(10):
            optimizer.zero_grad()
            model.objective(tokens, targets)[0].backward()
            optimizer.step()
        means.append(model(tokens).logsumexp(-1).abs().mean())
    assert means[1] < 0.9 * means[0]


def test_compiled_it_is_the_same() -> None:
    eager, compiled = (shake(tiny(losses=[ZLoss], compile=backend)) for backend in (None, "aot_eager"))
    compiled.load_state_dict(eager.state_dict())
    compiled.configure_model()
    tokens, targets = batch(eager)
    results = []
    for model in (eager, compiled):
        total, parts = model.objective(tokens, targets)
        total.backward()
        results.append([total, *parts.values(), *(p.grad for p in model.parameters())])
    assert gap(*results) < 1e-6


def test_promises() -> None:
    check_variant(tiny(losses=[ZLoss]))
