"""Per-token output bias: a second embedding of the input token, added to the features before the head."""

from functools import partial

import pytest
import torch
from helpers import D, T, V, batch, check_variant, shake, tiny
from overlaid import built, merged
from torch import nn
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import count
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.init import GPT2Init

biased = partial(tiny, token_bias=True)


@pytest.fixture
def pair() -> tuple[BlaGPT, BlaGPT]:
    """The tiny baseline, and the same with a table of zeros."""
    model, baseline = shake(biased()).eval(), tiny().eval()
    nn.init.zeros_(model.token_bias.weight)
    baseline.load_state_dict({name: p for name, p in model.state_dict().items() if not name.startswith("token_bias")})
    return model, baseline


def test_a_table_of_zeros_is_the_baseline_bit_for_bit(pair: tuple[BlaGPT, BlaGPT]) -> None:
    model, baseline = pair
    tokens, targets = batch(model)
    assert torch.equal(model(tokens), baseline(tokens))
    assert torch.equal(model.objective(tokens, targets)[0], baseline.objective(tokens, targets)[0])
    assert torch.equal(model.measure(tokens, targets), baseline.measure(tokens, targets))
    nn.init.normal_(model.token_bias.weight, std=0.02)
    assert (model(tokens) - baseline(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("head", [None, partial(LinearHead, bias=True)])
def test_it_is_its_formula(head: partial | None) -> None:
    """logits_t = head(norm(x_t) + E_b[token_t]): of the input token, after the norm, tied head or not."""
    model = shake(biased(**({} if head is None else {"head": head}))).eval()
    tokens, _ = batch(model)
    x, carry = model.trunk(tokens)
    features = model.norm(model.blocks[-1](x, carry)) + model.token_bias.weight[tokens]
    matrix, shift = (model.head.weight, None) if head is None else (model.head.linear.weight, model.head.linear.bias)
    assert torch.equal(model(tokens), F.linear(features, matrix, shift))


def test_a_row_moves_only_the_positions_that_hold_its_token(pair: tuple[BlaGPT, BlaGPT]) -> None:
    model, baseline = pair
    tokens, _ = batch(model)
    token = tokens[0, 3]
    with torch.no_grad():
        model.token_bias.weight[token] = 1.0
    moved = (model(tokens) - baseline(tokens)).abs().amax(-1) > 0
    assert torch.equal(moved, tokens == token)


def test_it_acts_wherever_the_model_is_used() -> None:
    """Forward, the loss of training, the ruler and generation agree; the original left it out of the last."""
    model = shake(biased(), std=0.3).eval()
    tokens, targets = batch(model)
    logits = model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert (model.next_logits(tokens) - logits[:, -1]).abs().max() < 1e-5
    assert abs(model.objective(tokens, targets)[0] - loss) < 1e-5
    assert abs(model.measure(tokens, targets) / targets.numel() - loss) < 1e-5

    prompt, greedy = tokens[:, :5], tokens[:, :5]
    for _ in range(8):
        greedy = torch.cat((greedy, model(greedy)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(model.generate(prompt, 8, temperature=0), greedy)
    nn.init.zeros_(model.token_bias.weight)
    assert not torch.equal(model.generate(prompt, 8, temperature=0), greedy)


def test_it_adds_a_table_of_its_own() -> None:
    model = biased()
    assert count(model.parameters()) - count(tiny().parameters()) == V * D
    assert model.parameter_roles()["token_bias.weight"] == "embedding"
    assert model.token_bias.weight is not model.embedding.weight
    assert model.token_bias in list(model.readout())


@pytest.mark.parametrize(("zero_outputs", "std"), [(True, 0.02), (False, 0.02), (True, 0.5)])
def test_it_starts_like_an_embedding(zero_outputs: bool, std: float) -> None:
    table = biased(vocab_size=1000, init=GPT2Init(zero_outputs=zero_outputs, std=std)).token_bias.weight
    n = table.numel()
    assert abs(table.std().item() / std - 1) < 5 / (2 * n) ** 0.5  # five standard errors
    assert abs(table.mean().item()) < 5 * std / n**0.5


def test_only_rows_that_were_read_receive_a_gradient() -> None:
    model = biased()
    tokens, targets = batch(model, size=1, length=T // 2)
    model.objective(tokens, targets)[0].backward()
    touched = model.token_bias.weight.grad.any(dim=1)
    assert set(touched.nonzero()[:, 0].tolist()) == set(tokens.flatten().tolist())


@pytest.mark.parametrize("changes", [{}, {"head": LinearHead}])
def test_the_promises_of_a_model_hold(changes: dict) -> None:
    check_variant(biased(**changes))


def additions() -> dict[str, dict]:
    return {
        "token bias": {"token_bias": True},
        "z-loss": {"losses": [ZLoss]},
        "multi-token": {"losses": [partial(MultiToken, n=3)]},
        "all": {"token_bias": True, "losses": [partial(MultiToken, n=2), ZLoss]},
    }


@pytest.mark.parametrize("name", additions())
def test_the_rest_starts_as_it_does_without_the_addition(name: str) -> None:
    """So that two runs of one seed, with and without it, differ by the addition alone."""
    torch.manual_seed(7)
    plain = tiny(init=GPT2Init(zero_outputs=False)).state_dict()
    torch.manual_seed(7)
    added = tiny(init=GPT2Init(zero_outputs=False), **additions()[name]).state_dict()
    assert all(torch.equal(value, added[key]) for key, value in plain.items())
    drawn = [value for key, value in added.items() if key not in plain and value.ndim > 1]
    assert all(value.std() > 0 for value in drawn)
    assert len({value.flatten()[0].item() for value in drawn}) == len(drawn)  # no two of the same throws


@pytest.mark.parametrize("name", ["hymba", "mamba2", "rene", "rwkv7", "zamba2"])
@torch.no_grad()
def test_the_bias_is_that_of_the_input_token(name: str) -> None:
    tree = merged(model=name)
    tree["model"]["init_args"]["token_bias"] = True
    model = shake(built(tree), 0.1).eval()
    tokens = torch.randint(model.vocab_size, (2, 9))
    whole, bias = model.features(tokens), model.token_bias.weight.clone()
    model.token_bias.weight.zero_()
    assert (whole - model.features(tokens) - bias[tokens]).abs().max() < 1e-5
