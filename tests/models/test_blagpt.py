"""BlaGPT: its size, the contract of a model, and how it compiles."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import (
    SITE,
    VARIANTS,
    Graphs,
    L,
    attention,
    batch,
    block,
    carry_of,
    check_variant,
    gated,
    qk_norm,
    shake,
    tiny,
    tiny_gpt2,
)
from torch import Tensor, nn

from blagpt_pl.errors import ConfigError
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import GELU, SiLU
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import Carry, Site, count
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.mlp import MLP, GatedMLP
from blagpt_pl.nn.norm import LayerNorm
from blagpt_pl.testing import check_model

# ---------------------------------------------------------------------- size


def sized(biases: bool, **changes: object) -> BlaGPT:
    """The baseline at its full size, without memory."""
    parts = block(
        attention=attention(n_heads=12, n_kv_heads=4, edits=[qk_norm, RoPE], qkv_bias=biases, out_bias=biases),
        mlp=partial(GatedMLP, activation=SiLU, ratio=4, bias=biases),
    )
    with torch.device("meta"):
        return tiny(**{"vocab_size": 50304, "context": 1024, "d_model": 768, "n_layers": 12, "block": parts, **changes})


def formula(
    vocabulary: int, layers: int, d: int, h: int, g: int, k: int, f: int, biases: bool, tied: bool = True
) -> int:
    """V D (2 if untied) + L [D (H + 2 G) K + H K D + 3 D F + 2 D + 2 K (+ (H + 2 G) K + D + 2 F + D)] + D."""
    layer = d * (h + 2 * g) * k + h * k * d + 3 * d * f + 2 * d + 2 * k
    layer += ((h + 2 * g) * k + d + 2 * f + d) if biases else 0
    return vocabulary * d * (1 if tied else 2) + layers * layer + d


def test_the_baseline_has_142_570_752_parameters() -> None:
    n = count(sized(biases=True).parameters())
    assert n == formula(50304, 12, 768, 12, 4, 64, 3072, biases=True) == 142_570_752


def test_without_biases_it_has_142_463_232() -> None:
    n = count(sized(biases=False).parameters())
    assert n == formula(50304, 12, 768, 12, 4, 64, 3072, biases=False) == 142_463_232


def test_a_head_of_its_own_adds_a_table() -> None:
    n = count(sized(biases=True, head=LinearHead).parameters())
    assert n == formula(50304, 12, 768, 12, 4, 64, 3072, biases=True, tied=False) == 142_570_752 + 50304 * 768


def test_gpt2_has_124_439_808_parameters() -> None:
    parts = block(
        norm=LayerNorm,
        attention=attention(n_heads=12, n_kv_heads=None, edits=[], qkv_bias=True, out_bias=True),
        mlp=partial(MLP, activation=GELU, bias=True),
    )
    with torch.device("meta"):
        model = tiny_gpt2(vocab_size=50257, context=1024, d_model=768, n_layers=12, block=parts)
    d, layers = 768, 12
    assert count(model.parameters()) == 50257 * d + 1024 * d + layers * (12 * d * d + 13 * d) + 2 * d == 124_439_808


# ---------------------------------------------------------------------- the contract


@pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)
def test_promises(build: Callable) -> None:
    check_variant(build())


def test_checking_leaves_a_model_alone(model: nn.Module) -> None:
    fresh = tiny().train()
    before = {name: p.clone() for name, p in fresh.state_dict().items()}
    check_model(fresh)
    assert fresh.training
    assert all(torch.equal(before[name], p) for name, p in fresh.state_dict().items())


def test_too_long_an_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: 33 a sequence \(context 32\); fix"):
        tiny()(torch.zeros(1, 33, dtype=torch.int64))


def test_tied_weights_are_one_tensor_everywhere() -> None:
    model = tiny()
    assert model.head.weight is model.embedding.weight
    assert copy.deepcopy(model).head.weight is not model.embedding.weight
    for moved in (copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).bfloat16()):
        assert moved.head.weight is moved.embedding.weight
        assert isinstance(moved.head, TiedHead)
    assert tiny(head=LinearHead).head.linear.weight is not model.embedding.weight


def test_a_block_is_its_formula() -> None:
    part = shake(block(post_norm=LayerNorm)(SITE))
    x = torch.randn(2, 23, SITE.d_model)
    carry, expected = carry_of(x), x
    for branch in (part.attention, part.mlp):
        expected = expected + branch.post(branch.part(branch.norm(expected), carry))
    assert isinstance(part.attention.post, LayerNorm)
    assert torch.equal(part(x, carry), expected)


def test_every_block_is_told_its_layer_and_every_part_sees_the_same_carry() -> None:
    class Probe(MLP):
        def __init__(self, site: Site) -> None:
            super().__init__(site, SiLU)
            self.site = site

        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            carry.memo[f"layer {self.site.layer}"] = x
            seen.append((list(carry.memo), carry.tokens, carry.x0))
            return super().forward(x, carry)

    seen: list[tuple] = []
    model = tiny(n_layers=3, block=block(mlp=Probe))
    assert [layer.mlp.part.site for layer in model.blocks] == [replace(SITE, n_layers=3, layer=i) for i in range(3)]
    tokens, _ = batch(model)
    for _ in range(2):  # the second time nothing is left of the first
        seen.clear()
        model(tokens)
        assert [memo for memo, _, _ in seen] == [[f"layer {i}" for i in range(n)] for n in (1, 2, 3)]
        assert all(t is tokens and torch.equal(x0, model.embedding(tokens)) for _, t, x0 in seen)


@pytest.mark.parametrize("changes", [{"dropout": 0.3}, {"block": block(dropout=0.3)}])
def test_dropout_acts_in_training_only(changes: dict) -> None:
    model = shake(tiny(**changes))
    tokens, _ = batch(model)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_bf16_autocast_is_close(model: BlaGPT) -> None:
    tokens, targets = batch(model)
    exact, _ = model.objective(tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.objective(tokens, targets)
    loss.backward()
    assert abs(loss - exact) < 0.01 * exact
    assert all(p.grad.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def learn_and_measure(model: BlaGPT, steps: int = 3) -> list[Tensor]:
    """Training steps and measurements in turn, as in a run: every loss, and every weight at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss, _ = model.objective(*batch(model, seed=step))
        loss.backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            losses += [loss.detach(), model.measure(*batch(model, seed=100 + step))]
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("build", [tiny, tiny_gpt2])
def test_compiled_equals_eager_in_two_graphs_for_all_blocks(build: Callable) -> None:
    backend = Graphs()
    eager = shake(build(n_layers=2 * L))
    compiled = build(n_layers=2 * L, compile=backend)
    compiled.load_state_dict(eager.state_dict())
    compiled.configure_model()
    compiled.configure_model()  # Lightning calls it more than once
    assert compiled.state_dict().keys() == eager.state_dict().keys()

    mine, theirs = learn_and_measure(compiled), learn_and_measure(eager)
    gap = max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))
    assert gap < 1e-6
    of_loss = [code for code in backend.seen if "log_softmax" in code]
    of_blocks = [code for code in backend.seen if "scaled_dot_product_attention" in code]
    assert len(of_blocks) == 2  # one that trains and one that measures, whatever the number of blocks
    assert len(of_loss) == 2
    assert len(backend.seen) == 4

    learn_and_measure(compiled)
    compiled.generate(batch(compiled)[0][:, :5], 3)
    assert len(backend.seen) == 4  # nothing is compiled again


@pytest.mark.usefixtures("fresh_compiler")
def test_a_graph_break_in_a_block_is_an_error() -> None:
    class Breaks(GatedMLP):
        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            return super().forward(x, carry) * (1.0 if x.sum().item() > 0 else 2.0)

    model = tiny(compile=Graphs(), block=block(mlp=partial(Breaks, activation=SiLU)))
    model.configure_model()
    with pytest.raises((torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)):
        model.objective(*batch(model))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_saved_and_copied_like_any_other() -> None:
    model = shake(tiny(compile=Graphs()))
    model.configure_model()
    tokens, _ = batch(model)
    logits = model(tokens)
    other = tiny()
    other.load_state_dict(model.state_dict(), strict=True)
    assert (other(tokens) - logits).abs().max() < 1e-6
    assert (copy.deepcopy(model)(tokens) - logits).abs().max() < 1e-6


needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@needs_a_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_a_branch() -> None:
    branch = shake(block(mlp=gated)(SITE)).mlp
    x = torch.randn(2, 23, SITE.d_model)
    with torch.no_grad():
        compiled = torch.compile(branch, backend="inductor", fullgraph=True, dynamic=False)(x, carry_of(x))
        assert (compiled - branch(x, carry_of(x))).abs().max() < 1e-5


@needs_a_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_compiles_a_block_and_its_backward() -> None:
    part = shake(block()(SITE))
    x = torch.randn(2, 23, SITE.d_model)
    outputs = []
    for run in (part, torch.compile(part, backend="inductor", fullgraph=True, dynamic=False)):
        leaf = x.clone().requires_grad_()
        y = run(leaf, carry_of(x))
        outputs.append([y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *part.parameters()])])
    for a, b in zip(*outputs, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, a.abs().max().item())


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(model: BlaGPT) -> None:
    tokens, targets = batch(model)
    loss, _ = model.objective(tokens, targets)
    with torch.autocast("cuda", torch.bfloat16):
        gpu_loss, _ = copy.deepcopy(model).cuda().objective(tokens.cuda(), targets.cuda())
    assert abs(gpu_loss.item() - loss.item()) < 0.01 * loss.item()


def test_flops_a_token_are_the_closed_formula() -> None:
    """6 for each weight of a matrix product, head included; 6 T H K a layer for causal attention. 911 MFLOP here."""
    weights = 12 * (768 * (12 + 8) * 64 + 768 * 768 + 3 * 768 * 3072) + 50304 * 768
    assert sized(biases=True).flops_per_token() == 6 * weights + 12 * 6 * 1024 * 768 == 911_278_080


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Muon])
def test_an_optimizer_that_does_not_fit_is_told(optimizer: type) -> None:
    with pytest.raises(ConfigError, match="model.optimizer: refuses the groups of this model: "):
        tiny(optimizer=optimizer).configure_optimizers()


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_a_dropout_that_leaves_nothing_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=r"model\.dropout: .* \(expected 0 or more, and below 1\)"):
        tiny(dropout=p)
