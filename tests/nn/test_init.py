"""How parameters start."""

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from helpers import SITE, D, V, attention, batch, block, carry_of, qk_norm, tiny, tiny_gpt2
from torch import nn
from torch.nn import functional as F

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import Init, OutputLinear
from blagpt_pl.nn.block import Branch
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm


@pytest.mark.parametrize("post_norm", [None, RMSNorm, LayerNorm])
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


# ---------------------------------------------------------------------- a start at zero that ends in a norm


def biased(post_norm: Callable | None, zero_outputs: bool = True) -> BlaGPT:
    """The baseline with all its biases, and a post-norm."""
    parts = block(
        attention=attention(edits=[qk_norm, RoPE], qkv_bias=True, out_bias=True),
        mlp=partial(GatedMLP, activation=SiLU, ratio=2, bias=True),
        post_norm=post_norm,
    )
    return tiny(block=parts, init=GPT2Init(zero_outputs=zero_outputs))


def branches(model: nn.Module) -> list[Branch]:
    return [module for module in model.modules() if isinstance(module, Branch)]


@torch.no_grad()
def written(model: BlaGPT) -> list[float]:
    """Root-mean-square of what each branch adds to the stream."""
    tokens, _ = batch(model)
    x = model.embedding(tokens)
    return [(branch(x, carry_of(x)) - x).square().mean().sqrt().item() for branch in branches(model)]


def step(model: BlaGPT, optimizer: torch.optim.Optimizer) -> float:
    """One step on one batch; the loss before it."""
    optimizer.zero_grad()
    loss, _ = model.objective(*batch(model))
    loss.backward()
    optimizer.step()
    return loss.item()


POST_NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm, "LayerNorm, no bias": partial(LayerNorm, bias=False)}


@pytest.mark.parametrize("post_norm", POST_NORMS.values(), ids=POST_NORMS)
def test_with_a_post_norm_a_branch_starts_small_and_stays_small(post_norm: Callable) -> None:
    model = biased(post_norm)
    assert written(model) == [0.0] * 4
    step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(0 < rms < 0.05 for rms in written(model))


@pytest.mark.parametrize("post_norm", POST_NORMS.values(), ids=POST_NORMS)
def test_a_zero_map_behind_a_post_norm_would_not_stay_small(post_norm: Callable) -> None:
    """What the original did: one step, and the norm blows what the map has become up to its gain."""
    model = biased(post_norm)
    for branch in branches(model):
        nn.init.ones_(branch.post.weight)
        for module in branch.modules():
            if isinstance(module, OutputLinear):
                module.start_output(0.0)
    assert written(model) == [0.0] * 4
    step(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(
        0.25 < rms < 1.1 for rms in written(model)
    )  # LayerNorm's eps, ten times RMSNorm's, holds some of it back


@pytest.mark.parametrize("post_norm", POST_NORMS.values(), ids=POST_NORMS)
def test_with_a_post_norm_everything_learns_within_three_steps(post_norm: Callable) -> None:
    model = biased(post_norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    idle, inside = [], {name for name, _ in model.named_parameters() if name.startswith("blocks.")}
    for _ in range(3):
        step(model, optimizer)
        idle.append({name for name, p in model.named_parameters() if not p.grad.any()})
    assert idle[0] == {name for name in inside if ".post." not in name}
    assert idle[2] == set()


@pytest.mark.parametrize("post_norm", [None, RMSNorm])
@pytest.mark.parametrize("zero_outputs", [True, False])
def test_what_starts_at_zero_is_last_in_its_branch(post_norm: type | None, zero_outputs: bool) -> None:
    for branch in branches(biased(post_norm, zero_outputs)):
        outputs = [module for module in branch.modules() if isinstance(module, OutputLinear)]
        assert len(outputs) == 1
        assert outputs[0].weight.any() == (not zero_outputs or post_norm is not None)
        if outputs[0].weight.any():
            assert abs(outputs[0].weight.std().item() / 0.01 - 1) < 0.15  # 0.02 / sqrt(2 · 2)
        if post_norm is not None:
            assert torch.equal(branch.post.weight, torch.full((D,), 0.0 if zero_outputs else 1.0))


def test_blocks_elsewhere_in_the_model_start_alike() -> None:
    """A block that a term of the loss brings along is a module of the model, too."""
    model = nn.ModuleDict({"term": nn.ModuleList([block(post_norm=RMSNorm)(SITE)])})
    GPT2Init(zero_outputs=True)(model, SITE)
    assert [branch.post.weight.any().item() for branch in branches(model)] == [False, False]
    assert all(module.weight.any() for module in model.modules() if isinstance(module, OutputLinear))


def test_a_post_norm_without_a_gain_is_refused_with_zero_outputs() -> None:
    for norm in (partial(LayerNorm, gain=False), partial(LayerNorm, gain=False, bias=False)):
        with pytest.raises(ValueError, match=r"block\.post_norm: LayerNorm has no gain .*; fix: .*zero_outputs: false"):
            biased(norm)
        biased(norm, zero_outputs=False)


# ---------------------------------------------------------------------- ADOPT


class Adopt(torch.optim.Optimizer):
    """Taniguchi et al. 2024, arXiv:2411.02853: an oracle for this test, of the published form and of the one before it.

    v_1 = g²; then u = g / max(sqrt(v), eps), clipped to ± (t - 1)^(1/4); m ← b1 m + (1 - b1) u; p ← p - lr m;
    v ← b2 v + (1 - b2) g².
    """

    def __init__(self, params: Iterable, lr: float, clipped: bool, betas: tuple = (0.9, 0.9999), eps: float = 1e-6):
        super().__init__(params, {"lr": lr})
        self.clipped, self.betas, self.eps, self.t = clipped, betas, eps, 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        b1, b2 = self.betas
        for group in self.param_groups:
            for p in group["params"]:
                state, g = self.state[p], p.grad
                if self.t == 1:
                    state["m"], state["v"] = torch.zeros_like(p), g.square()
                    continue
                u = g / state["v"].sqrt().clamp(min=self.eps)
                if self.clipped:
                    u = u.clamp(-((self.t - 1) ** 0.25), (self.t - 1) ** 0.25)
                state["m"] = b1 * state["m"] + (1 - b1) * u
                p.sub_(state["m"], alpha=group["lr"])
                state["v"] = b2 * state["v"] + (1 - b2) * g.square()


def adopt(model: BlaGPT, clipped: bool, steps: int = 30) -> tuple[list[float], float]:
    """The losses of 30 steps, and the largest weight after them."""
    optimizer = Adopt(model.parameters(), lr=3e-3, clipped=clipped)
    losses = [step(model, optimizer) for _ in range(steps)]
    return losses, max(p.abs().max().item() for p in model.parameters())


@pytest.mark.parametrize("post_norm", [None, RMSNorm])
def test_adopt_trains_a_zero_start(post_norm: type | None) -> None:
    """Behind what is zero no gradient flows in ADOPT's first step, and it then divides by what that step has seen."""
    losses, largest = adopt(biased(post_norm), clipped=True)
    assert losses[-1] < losses[0] - 0.5
    assert largest < 2
    _, largest = adopt(biased(post_norm), clipped=False)
    assert largest > 20
