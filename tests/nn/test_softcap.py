"""Soft-capping: the formula, in the head and its chunked loss, and in attention, whose fused form equals its naive twin."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import SITE, D, V, attention, batch, block, carry_of, heads, shake, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention

from blagpt_pl.losses.chunked import Chunked
from blagpt_pl.losses.next_token import full
from blagpt_pl.nn.attention import core_softcap
from blagpt_pl.nn.attention import flex as flexes
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped, eager, flex
from blagpt_pl.nn.base import Heads
from blagpt_pl.nn.compiled import APART
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.softcap import SoftCap

CAPPED = {"tied": partial(TiedHead, softcap=30.0), "linear": partial(LinearHead, bias=True, softcap=30.0)}
unfused = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")

# ---------------------------------------------------------------------- the formula


@settings(deadline=None)
@given(st.floats(-1e4, 1e4), st.floats(0.1, 1e3))
def test_the_formula(x: float, cap: float) -> None:
    y = SoftCap(cap)(torch.tensor(x, dtype=torch.float64)).item()
    assert abs(y - cap * math.tanh(x / cap)) < 1e-10
    assert abs(y) <= cap
    assert abs(y - x) <= abs(x) ** 3 / (3 * cap**2) + 1e-10  # small numbers stay
    assert SoftCap(cap)(torch.tensor(-x, dtype=torch.float64)).item() == -y


def test_it_is_not_done_in_place() -> None:
    """The original's was: the backward pass of tanh found its output overwritten, and training crashed in eager mode."""
    x = (30 * torch.randn(50, dtype=torch.float64)).requires_grad_()
    before, cap = x.detach().clone(), SoftCap(30.0)
    y = cap(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(x, before)
    assert (slope - (1 - (y / 30) ** 2)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(cap, x)


def test_it_works_in_float32_and_keeps_the_dtype() -> None:
    x = (30 * torch.randn(1000)).bfloat16()
    y, exact = SoftCap(30.0)(x), SoftCap(30.0)(x.double())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    assert (30 * torch.tanh(x / 30) != y).any()  # as it would be in bfloat16


@pytest.mark.parametrize("cap", [0, 0.0, -30.0, math.nan, math.inf])
def test_a_cap_that_caps_nothing_is_refused(cap: float) -> None:
    for head in (TiedHead, LinearHead):
        with pytest.raises(ValueError, match=rf"model\.head\.softcap: {cap} \(expected a positive number"):
            head(SITE, nn.Embedding(V, D), softcap=cap)
    with pytest.raises(ValueError, match=rf"SoftCapped\.cap: {cap} \(expected a positive number"):
        SoftCapped(heads(4, 2, 8), cap)


# ---------------------------------------------------------------------- the head


def loud(head: object, scale: float = 100.0) -> nn.Module:
    """A tiny model whose logits would be far beyond a cap."""
    model = shake(tiny(head=head)).double().eval()  # large numbers leave float32 few decimals
    with torch.no_grad():
        model.embedding.weight.mul_(scale)
        if hasattr(model.head, "linear"):
            model.head.linear.weight.mul_(scale)
    return model


@pytest.mark.parametrize("head", CAPPED)
def test_logits_are_those_of_the_plain_head_capped(head: str) -> None:
    model, plain = loud(CAPPED[head]), loud(TiedHead if head == "tied" else partial(LinearHead, bias=True))
    plain.load_state_dict(model.state_dict())  # the cap has no parameters
    tokens, _ = batch(model)
    logits, raw = model(tokens), plain(tokens)
    assert raw.abs().max() > 40
    assert logits.abs().max() <= 30
    assert (logits - 30 * torch.tanh(raw / 30)).abs().max() < 1e-5


@pytest.mark.parametrize("head", CAPPED)
def test_training_validation_and_generation_see_the_same_cap(head: str) -> None:
    """The original's cap was left out of inference."""
    model = loud(CAPPED[head])
    tokens, targets = batch(model)
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert abs(model.objective(tokens, targets)[1]["loss"].item() - expected) < 1e-5
    assert abs(model.measure(tokens, targets).item() / targets.numel() - expected) < 1e-5
    assert (model.next_logits(tokens) - logits[:, -1]).abs().max() < 1e-5


@pytest.mark.parametrize("chunk", [7, 50, 8192])
@pytest.mark.parametrize("head", CAPPED)
def test_the_chunked_loss_equals_its_twin(head: str, chunk: int) -> None:
    module = CAPPED[head](SITE, nn.Embedding(V, D)).double()
    x = ((3 if head == "tied" else 30) * torch.randn(3, 17, D, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(V, (3, 17))
    inputs, results = [x, *module.parameters()], []
    for loss in (Chunked(chunk).parts(module, x, targets)[0], full(module, x, targets)):
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert module(x).abs().max() > 20
    for mine, twin in zip(*results, strict=True):
        assert twin.any()
        assert (mine - twin).abs().max() < 1e-12


# ---------------------------------------------------------------------- attention


def oracle(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
    """One output number after the other."""
    n, length, groups, dim = q.shape[1], q.shape[2], k.shape[1], q.shape[3]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b in range(len(q)):
        for h in range(n):
            g = h // (n // groups)
            for t in range(length):
                scores = [(q[b, h, t] @ k[b, g, s]).item() / math.sqrt(dim) for s in range(t + 1)]
                weights = [math.exp(cap * math.tanh(score / cap)) for score in scores]
                for s, weight in enumerate(weights):
                    out[b, h, t] += weight / sum(weights) * v[b, g, s]
    return out


def qkv(
    n: int = 4, n_kv: int = 2, dim: int = 8, values: int = 8, length: int = 13, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Queries and keys whose scores have a standard deviation of 25."""
    shapes = [(2, n, length, dim), (2, n_kv, length, dim), (2, n_kv, length, values)]
    return [size * torch.randn(shape, dtype=dtype) for size, shape in zip((5, 5, 1), shapes, strict=True)]


@pytest.mark.parametrize("cap", [5.0, 50.0])
@pytest.mark.parametrize(("n", "n_kv", "values"), [(4, 4, 8), (4, 2, 8), (6, 2, 5), (3, 1, 12)])
def test_eager_equals_a_loop(n: int, n_kv: int, values: int, cap: float) -> None:
    q, k, v = qkv(n, n_kv, values=values)
    expected = oracle(q, k, v, cap)
    y = SoftCapped(Heads(SITE, n, n_kv, 8, values), cap)(q, k, v)
    assert y.shape == expected.shape
    assert (y - expected).abs().max() < 1e-12
    assert (eager(q, k, v, 2 * cap) - expected).abs().max() > 1e-2  # another cap
    assert (eager(q * 8**0.5, k, v, cap * 8**0.5) - expected).abs().max() > 1e-2  # a cap before the scaling


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), st.integers(1, 6), st.integers(1, 6))
def test_eager_equals_a_loop_for_any_shape(groups: int, each: int, length: int, dim: int, values: int) -> None:
    q, k, v = qkv(groups * each, groups, dim, values, length)
    assert (eager(q, k, v, 9.0) - oracle(q, k, v, 9.0)).abs().max() < 1e-12


def test_bf16_scores_are_capped_and_normalised_in_float32() -> None:
    """Only the probabilities are rounded, before they meet the values, and the result."""
    q, k, v = (x.bfloat16() for x in qkv(n_kv=4, length=200, dtype=torch.float32))
    past = torch.ones(200, 200, dtype=torch.bool).tril()

    def through(scores: Tensor) -> Tensor:
        scores = 20 * torch.tanh(scores * 8**-0.5 / 20)
        return scores.masked_fill(~past, -torch.inf).softmax(-1).bfloat16() @ v

    exact = through(q.double() @ k.double().mT)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = eager(q, k, v, 20.0)
        assert y.dtype == torch.bfloat16
        assert (y - exact).abs().max() < 2**-8 * exact.abs().max()
    assert (through(q @ k.mT) - exact).abs().max() > 2**-6 * exact.abs().max()  # as it would be in bfloat16


def test_a_distant_cap_is_plain_attention() -> None:
    q, k, v = qkv()
    plain = SDPA(heads(4, 2, 8))(q, k, v)
    assert (SoftCapped(heads(4, 2, 8), 1e7)(q, k, v) - plain).abs().max() < 1e-9
    assert (SoftCapped(heads(4, 2, 8))(q, k, v) - plain).abs().max() > 1e-2


def test_it_counts_what_plain_attention_counts() -> None:
    for at in (heads(4, 2, 8), Heads(SITE, 4, 2, 8, 12)):
        assert SoftCapped(at).flops_per_token(32) == SDPA(at).flops_per_token(32)


@unfused
@pytest.mark.parametrize("length", [13, 128, 200])
@pytest.mark.parametrize(("n", "n_kv", "values"), [(4, 4, 8), (6, 2, 5)])
def test_flex_equals_eager(n: int, n_kv: int, values: int, length: int) -> None:
    """The fused form's own score and mask functions, run by torch's unfused implementation of them."""
    q, k, v = qkv(n, n_kv, values=values, length=length, dtype=torch.float32)
    y = eager(q, k, v, 20.0)
    assert (flex(q, k, v, 20.0) - y).abs().max() < 1e-5
    assert (flex(q, k, v, 40.0) - y).abs().max() > 1e-2


def test_flex_traces_as_one_graph_and_has_the_gradients_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU torch refuses flex's backward pass though it has one: its reference, which the graph runs here."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)
    inputs = [x.requires_grad_() for x in qkv(6, 2, values=5, length=150, dtype=torch.float32)]
    weight = torch.randn(2, 6, 150, 5)
    compiled = torch.compile(flex, backend="aot_eager", fullgraph=True, dynamic=False)
    mine, twin = (torch.autograd.grad(f(*inputs, 20.0), inputs, weight) for f in (compiled, eager))
    for a, b in zip(mine, twin, strict=True):
        assert b.abs().max() > 1
        assert (a - b).abs().max() < 1e-4


def test_a_block_compiles_with_it_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, where `flex` stands in the block's own graph."""
    layer = shake(block(attention=attention(core=partial(SoftCapped, cap=2.0)))(SITE)).requires_grad_(False)
    x = 3 * torch.randn(2, 23, D)
    y = layer(x, carry_of(x))
    monkeypatch.setattr(core_softcap, "eager", flex)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    assert (compiled(x, carry_of(x)) - y).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "values", "expected"),
    [
        ("cuda", torch.bfloat16, 16, 16, "fused"),
        ("cuda", torch.float32, 64, 32, "fused"),
        ("cuda", torch.bfloat16, 15, 16, "eager"),  # the kernel begins at 16, for queries and for values
        ("cuda", torch.bfloat16, 16, 15, "eager"),
        ("cuda", torch.float64, 64, 64, "eager"),
        ("cpu", torch.bfloat16, 64, 64, "eager"),
    ],
)
@pytest.mark.parametrize("compiling", [False, True])
def test_which_form_runs(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    dim: int,
    values: int,
    expected: str,
    compiling: bool,
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(core_softcap, "eager", lambda q, k, v, cap: ("eager", q, k, v, cap))
    monkeypatch.setattr(core_softcap, "flex", lambda q, k, v, cap: ("flex", q, k, v, cap))
    monkeypatch.setattr(flexes, "compiled", lambda form, twin: lambda q, k, v, cap: ("fused", q, k, v, cap))
    q, k, v = (
        SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(2, n, 13, width))
        for n, width in ((4, dim), (2, dim), (2, values))
    )
    form = "flex" if compiling and expected == "fused" else expected  # a block that is compiled: one graph
    core = SoftCapped(Heads(SITE, 4, 2, dim, values), 7.0)
    assert core.forward(q, k, v) == (form, q, k, v, 7.0)
    assert core.kernel(q.device, dtype, 13) == ("flex" if expected == "fused" else "scores in memory")


def test_what_is_compiled_on_its_own_is_the_form_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **how: (f, how))
    either, how = flexes.compiled.__wrapped__(lambda *given: ("flex", *given), lambda *given: ("eager", *given))
    assert how == {"dynamic": False, **APART}
    for compiling, form in ((True, "flex"), (False, "eager")):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        assert either(None, None, None, 7.0) == (form, None, None, None, 7.0)


@pytest.mark.filterwarnings("error:.*flex_attention called without torch.compile.*")
def test_it_falls_back_on_its_twin_where_torch_is_told_to_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """As generation tells it, for which every length would be a graph."""
    q, k, v = qkv(length=17, dtype=torch.float32)
    y, graphs, compile_with = eager(q, k, v, 20.0), [], torch.compile
    backend = lambda graph, _: graphs.append(graph) or graph
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile_with(f, backend=backend, **how))
    compiled = flexes.compiled.__wrapped__(flex, eager)
    assert (compiled(q, k, v, 20.0) - y).abs().max() < 1e-5
    assert ["flex_attention" in str(graph.code) for graph in graphs] == [True]
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(compiled(q, k, v, 20.0), y)


@pytest.mark.gpu
@pytest.mark.parametrize("values", [64, 32])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-2)])
def test_the_kernel_equals_eager(dtype: torch.dtype, tolerance: float, values: int) -> None:
    for length in (200, 1024):
        inputs = [x.cuda().to(dtype).requires_grad_() for x in qkv(12, 4, 64, values, length, torch.float32)]
        core, weight = SoftCapped(Heads(SITE, 12, 4, 64, values)), torch.randn(2, 12, length, values).cuda()
        exact = [x.detach().float().requires_grad_() for x in inputs]
        whole = torch.compile(core, fullgraph=True, dynamic=False)
        y, twin = core(*inputs), eager(*exact, 50.0)
        for mine in (y, whole(*inputs)):
            assert mine.dtype == dtype
            assert (mine - twin).abs().max() < tolerance * twin.abs().max()
            grads = torch.autograd.grad(mine, inputs, weight.to(dtype))
            expected = torch.autograd.grad(twin, exact, weight, retain_graph=True)
            for a, b in zip(grads, expected, strict=True):
                assert (a - b).abs().max() < tolerance * b.abs().max()


@pytest.mark.gpu
def test_a_compiled_model_trains_and_generates_with_it() -> None:
    parts = block(attention=attention(head_dim=16, core=SoftCapped))
    model = tiny(block=parts, compile="inductor").cuda()
    model.configure_model()
    tokens, targets = (t.cuda() for t in batch(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            total, parts = model.objective(tokens, targets)
        total.backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < losses[0] - 0.1
    assert model.generate(tokens[:, :5], 9).shape == (3, 14)
