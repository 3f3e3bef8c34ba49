"""How parameters start."""

from functools import partial

import pytest
import torch
from helpers import SITE, D, V, batch, block, carry_of, tiny, tiny_gpt2
from torch import nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Init, OutputLinear
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.norm import RMSNorm


@pytest.mark.parametrize("post_norm", [None, RMSNorm])
def test_zero_outputs_make_every_block_the_identity(post_norm: type | None) -> None:
    model = tiny(block=block(post_norm=post_norm), init=GPT2Init(zero_outputs=True)).eval()
    x = torch.randn(2, 23, D)
    for layer in model.blocks:
        assert torch.equal(layer(x, carry_of(x)), x)
    tokens, _ = batch(model)
    expected = F.linear(model.norm(model.embedding(tokens)), model.embedding.weight)
    assert torch.equal(model(tokens), expected)


def test_without_it_no_block_is() -> None:
    x = torch.randn(2, 23, D)
    for layer in tiny(init=GPT2Init(zero_outputs=False)).blocks:
        assert (layer(x, carry_of(x)) - x).abs().max() > 1e-4


def test_zero_outputs_still_learn() -> None:
    """At step 0 only the outputs, the norm and the table receive a gradient; after one step everything does."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    idle = []
    for _ in range(2):
        optimizer.zero_grad()
        model.objective(*batch(model))[0].backward()
        idle.append({name for name, p in model.named_parameters() if not p.grad.any()})
        optimizer.step()
    outputs = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, OutputLinear)}
    inside = {name for name, _ in model.named_parameters() if name.startswith("blocks.")}
    assert idle[0] == inside - outputs
    assert idle[1] == set()


@pytest.mark.parametrize(("std", "n_layers"), [(0.02, 2), (0.5, 8)])
def test_standard_deviations(std: float, n_layers: int) -> None:
    model = tiny_gpt2(d_model=64, n_layers=n_layers, head=LinearHead, init=GPT2Init(zero_outputs=False, std=std))
    seen = {"output": 0, "other": 0}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            output = isinstance(module, OutputLinear)
            expected = std / (2 * n_layers) ** 0.5 if output else std
            n = module.weight.numel()
            assert abs(module.weight.std().item() / expected - 1) < 5 / (2 * n) ** 0.5  # five standard errors
            assert abs(module.weight.mean().item()) < 5 * expected / n**0.5
            seen["output" if output else "other"] += 1
            if getattr(module, "bias", None) is not None:
                assert not module.bias.any()
    assert seen == {"output": 2 * n_layers, "other": 2 * n_layers + 3}


def test_norms_keep_their_own_start() -> None:
    model = tiny_gpt2()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p))


def test_the_same_seed_gives_the_same_start() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(tiny().embedding.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_init_must_be_said() -> None:
    with pytest.raises(NotImplementedError, match="Init"):
        Init()(nn.Linear(D, V), SITE)


@pytest.mark.parametrize("socket", ["block", "norm", "head"])
def test_an_empty_socket_is_told(socket: str) -> None:
    with pytest.raises(ValueError, match=f"model.{socket}: empty"):
        tiny(**{socket: None})


@pytest.mark.parametrize(("socket", "name"), [("norm", "norm"), ("attention", "attention"), ("mlp", "mlp")])
def test_an_empty_socket_of_a_block_is_told(socket: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"block.{name}: empty"):
        tiny(block=partial(block(), **{socket: None}))
