"""Sliding windows: the band and nothing else, by chunks and through flex_attention; block masks are made once."""

import copy
import math
import operator
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from helpers import SITE, D, attention, block, carry_of, copy_mlp_and_norms, gated, heads, shake, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from blagpt_pl.nn.attention import core_window
from blagpt_pl.nn.attention import flex as flexes
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.core_window import Windowed, banded, flex
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.flex import BLOCKS, band, blocks, found
from blagpt_pl.nn.base import Heads, Site
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.init import GPT2Init

CPU = torch.device("cpu")
unfused = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")


def qkv(
    n: int = 4, n_kv: int = 2, dim: int = 8, values: int = 8, length: int = 13, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [
        2 * torch.randn(2, x, length, w, dtype=dtype).requires_grad_()
        for x, w in ((n, dim), (n_kv, dim), (n_kv, values))
    ]


def oracle(q: Tensor, k: Tensor, v: Tensor, window: int, cap: float | None = None) -> Tensor:
    """One output vector after the other, from the formula."""
    rows = []
    for h in range(q.shape[1]):
        g = h // (q.shape[1] // k.shape[1])
        for t in range(q.shape[2]):
            near = slice(max(0, t - window + 1), t + 1)
            s = (k[:, g, near] @ q[:, h, t, :, None]).squeeze(-1) / math.sqrt(q.shape[3])
            s = s if cap is None else cap * torch.tanh(s / cap)
            rows.append((s.softmax(-1)[..., None] * v[:, g, near]).sum(1))
    return torch.stack(rows, dim=1).unflatten(1, q.shape[1:3])


def gaps(mine: Tensor, twin: Tensor, inputs: list[Tensor]) -> list[float]:
    """Of the values, and of each gradient."""
    weight = torch.randn_like(twin)
    mine_and_twin = [[y, *torch.autograd.grad(y, inputs, weight)] for y in (mine, twin)]
    return [(a - b).abs().max().item() for a, b in zip(*mine_and_twin, strict=True)]


@pytest.fixture
def no_masks() -> Iterator[None]:
    """No block mask has been made yet, nor will one of the test's stay."""
    found.cache_clear()
    yield
    found.cache_clear()


@pytest.fixture
def trained_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU torch refuses flex's backward pass though it has one: its reference, which a graph runs here."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda q, k, v: None)


# ---------------------------------------------------------------------- by chunks


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 12, 23])
@pytest.mark.parametrize(("n", "n_kv", "values"), [(4, 4, 8), (6, 2, 5)])
def test_it_equals_a_loop(n: int, n_kv: int, values: int, length: int, cap: float | None) -> None:
    inputs = qkv(n, n_kv, values=values, length=length)
    core = Windowed(Heads(SITE, n, n_kv, 8, values), 6, cap)
    assert max(gaps(core(*inputs), oracle(*inputs, 6, cap), inputs)) < 1e-11
    if length > 6:
        for other in (5, 7):
            assert (core(*inputs) - oracle(*inputs, other, cap)).abs().max() > 1e-3


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(2, 31), st.sampled_from([None, 2.0]))
def test_it_equals_a_loop_for_any_shape(groups: int, each: int, length: int, window: int, cap: float | None) -> None:
    inputs = qkv(groups * each, groups, 3, 4, length)
    mine = Windowed(Heads(SITE, groups * each, groups, 3, 4), window, cap)(*inputs)
    assert max(gaps(mine, oracle(*inputs, window, cap), inputs)) < 1e-11


def test_below_the_window_it_is_plain_attention() -> None:
    inputs = qkv(length=20)
    for core, plain in (
        (Windowed(heads(4, 2, 8), 20), SDPA(heads(4, 2, 8))),
        (Windowed(heads(4, 2, 8), 31, 2.0), SoftCapped(heads(4, 2, 8), 2.0)),
    ):
        assert max(gaps(core(*inputs), plain(*inputs), inputs)) < 1e-12


def test_mistral() -> None:
    """Whole models, weights copied, equal an independent implementation; its window counts the query's position, too."""
    transformers = pytest.importorskip("transformers")
    window, length, k = 7, 29, 8

    def theirs(window: int | None) -> nn.Module:
        config = transformers.MistralConfig(
            vocab_size=61, hidden_size=D, intermediate_size=2 * D, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=k, max_position_embeddings=32, sliding_window=window, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager", pad_token_id=None,
        )  # fmt: skip
        return transformers.MistralForCausalLM(config).double().eval()

    core = partial(Windowed, window=window)
    model = tiny(
        block=block(attention=attention(edits=[RoPE], core=core), mlp=gated), head=LinearHead,
        init=GPT2Init(zero_outputs=False),
    )  # fmt: skip
    shake(model, std=0.2).double().eval()
    reference, states = theirs(window), []
    with torch.no_grad():
        reference.model.embed_tokens.weight.copy_(model.embedding.weight)
        reference.lm_head.weight.copy_(model.head.linear.weight)
        reference.model.norm.weight.copy_(model.norm.weight)
        for mine, layer in zip(model.blocks, reference.model.layers, strict=True):
            copy_mlp_and_norms(mine, layer)
            rows = mine.attention.part.qkv.weight.split([4 * k, 2 * k, 2 * k])
            attend = layer.self_attn
            for projection, weight in zip((attend.q_proj, attend.k_proj, attend.v_proj), rows, strict=True):
                projection.weight.copy_(weight)
            attend.o_proj.weight.copy_(mine.attention.part.out.weight)
        tokens = torch.randint(61, (3, length))
        mine = model(tokens)
        for other in (window, window - 1, window + 1, None):
            model_of_other = theirs(other)
            model_of_other.load_state_dict(reference.state_dict())
            states.append((mine - model_of_other(tokens).logits).abs().max().item())
    assert states[0] < 1e-5  # its RoPE and norms work in float32
    assert min(states[1:]) > 1e-2


def test_bfloat16_under_autocast_and_mixed_dtypes() -> None:
    """A softmax in float32 whatever the inputs; edits may leave queries and keys wide."""
    inputs = [x.detach() for x in qkv(length=31, dtype=torch.float32)]
    for cap in (None, 3.0):
        exact = oracle(*(x.bfloat16().double() for x in inputs), 6, cap)
        core = Windowed(heads(4, 2, 8), 6, cap)
        for wide in (0, 1, 2):
            q, k, v = (x if i < wide else x.bfloat16() for i, x in enumerate(inputs))
            for autocast in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = core(q, k, v)
                assert y.dtype == torch.bfloat16
                assert (y - exact).abs().max() < 0.05 * exact.abs().max()


def test_without_memory_it_has_the_shape_of_its_values() -> None:
    core, (q, k, v) = Windowed(Heads(SITE, 4, 2, 8, 9), 6), qkv(length=13, values=9)
    y = core(*(x.to("meta", torch.float32) for x in (q, k, v)))
    assert (y.device.type, y.shape) == ("meta", (2, 4, 13, 9))


def largest(core: Windowed, length: int) -> int:
    """Numbers in the largest tensor that is kept for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        core(*qkv(length=length))
    return max(sizes)


@pytest.mark.parametrize("cap", [None, 3.0])
def test_no_tensor_is_quadratic_in_the_length(cap: float | None) -> None:
    core = Windowed(heads(4, 2, 8), 16, cap)
    assert 3.9 < largest(core, 1024) / largest(core, 256) < 4.5
    assert largest(core, 1024) < 1024 * 1024 / 4


def test_it_compiles_to_one_graph_a_length() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    core = Windowed(heads(4, 2, 8), 6)
    compiled = torch.compile(core, backend=graphs, fullgraph=True, dynamic=False)
    for length in (16, 13, 16):
        inputs = qkv(length=length)
        assert max(gaps(compiled(*inputs), core(*inputs), inputs)) < 1e-12
    assert graphs.frame_count == 2


# ---------------------------------------------------------------------- what it says of itself


@pytest.mark.parametrize("length", [1, 5, 6, 7, 31])
def test_flops_count_the_pairs(length: int) -> None:
    t, s = torch.arange(length)[:, None], torch.arange(length)
    pairs = ((s <= t) & (t - s < 6)).sum().item()
    core = Windowed(Heads(SITE, 4, 2, 8, 12), 6)
    assert core.flops_per_token(length) == 2 * 4 * (8 + 12) * pairs // length
    assert core.flops_per_token(4096) < SDPA(core.heads).flops_per_token(4096) / 100


@pytest.mark.parametrize(
    ("window", "cap", "message"),
    [
        (
            32,
            None,
            r"layer 0: Windowed\.window: 32 leaves nothing out of 32 tokens \(expected less\); fix: a shorter window, or SDPA as the core",
        ),
        (
            99,
            5.0,
            r"99 leaves nothing out of 32 tokens \(expected less\); fix: a shorter window, or SoftCapped with a cap of 5.0",
        ),
        (1, None, r"Windowed\.window: 1 \(expected 2 or more"),
        (0, None, "expected 2 or more"),
        (-3, None, "expected 2 or more"),
        (8, 0.0, r"Windowed\.cap: 0.0 \(expected a positive number"),
        (8, math.nan, r"Windowed\.cap: nan"),
    ],
)
def test_a_mistake_is_told_when_building(window: int, cap: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windowed(heads(4, 2, 8), window, cap)


# ---------------------------------------------------------------------- through flex_attention


@unfused
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("length", [13, 128, 300])
@pytest.mark.parametrize(("n", "n_kv", "values"), [(4, 4, 8), (6, 2, 5)])
def test_flex_equals_its_twin(n: int, n_kv: int, values: int, length: int, cap: float | None) -> None:
    """The kernel's own rule and change of scores, run by torch's unfused implementation of them."""
    q, k, v = (x.detach() for x in qkv(n, n_kv, values=values, length=length, dtype=torch.float32))
    twin = banded(q, k, v, 7, cap)
    assert (flex(q, k, v, 7, cap) - twin).abs().max() < 1e-5
    assert (flex(q, k, v, 8, cap) - twin).abs().max() > 1e-2


@pytest.mark.parametrize("window", [7, 128, 150, 256])
@pytest.mark.parametrize("length", [130, 300, 512])
def test_the_blocks_are_those_of_the_band(window: int, length: int) -> None:
    """Every pair of the band is in a block that is read; every block of which all is read, is in the band whole."""
    partly, where, full, whole = (x[0, 0] for x in blocks(band, window, length, CPU)[:4])
    n = -(-length // 128)
    t, s = torch.arange(128 * n)[:, None], torch.arange(128 * n)
    pairs = ((s <= t) & (t - s < window)).unflatten(1, (n, 128)).unflatten(0, (n, 128))  # (n, 128, n, 128)
    some, every = pairs.any(3).any(1), pairs.all(3).all(1)
    for i in range(n):
        got = {*where[i, : partly[i]].tolist()}, {*whole[i, : full[i]].tolist()}
        expected_whole = {*every[i].nonzero().flatten().tolist()}
        assert got[0] | got[1] == {*some[i].nonzero().flatten().tolist()}
        assert got[1] <= expected_whole


@pytest.mark.usefixtures("trained_on_cpu", "no_masks")
@pytest.mark.parametrize("cap", [None, 3.0])
def test_flex_traces_as_one_graph_and_has_the_gradients_of_its_twin(cap: float | None) -> None:
    torch._dynamo.reset()
    inputs = qkv(6, 2, values=5, length=150, dtype=torch.float32)
    compiled = torch.compile(flex, backend="aot_eager", fullgraph=True, dynamic=False)
    assert max(gaps(compiled(*inputs, 40, cap), banded(*inputs, 40, cap), inputs)) < 1e-4


@pytest.mark.usefixtures("trained_on_cpu", "no_masks")
def test_a_mask_is_made_once_for_all_layers_and_steps_and_no_graph_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one window share a graph, too, as their blocks do."""
    torch._dynamo.reset()
    made, create = [], flexes.create_block_mask
    monkeypatch.setattr(flexes, "create_block_mask", lambda *a, **k: made.append(a) or create(*a, **k))
    monkeypatch.setattr(core_window, "banded", flex)  # the path of a GPU, where flex stands in the block's own graph
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    cores = [Windowed(heads(4, 2, 8), w) for w in (7, 7, 9)]
    for core in cores:
        core.compile(backend=backend, fullgraph=True, dynamic=False)
    for length in (30, 20, 30):
        inputs = [x.detach() for x in qkv(length=length, dtype=torch.float32)]
        for core in cores:
            assert (core(*inputs) - banded(*inputs, core.window, None)).abs().max() < 1e-5
    assert len(made) == 4  # two windows, two lengths
    assert len(graphs) == 4
    for graph in graphs:
        made_of = {str(n.target) for n in graph.graph.nodes if n.op in ("call_function", "call_method")}
        assert made_of - {"flex_attention", "to"} <= {str(operator.getitem)}


@pytest.mark.usefixtures("trained_on_cpu", "no_masks")
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_mask_made_in_inference_serves_training(first: Callable) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(flex, backend="aot_eager", fullgraph=True, dynamic=False)
    inputs = qkv(length=20, dtype=torch.float32)
    with first():
        compiled(*inputs, 7, None)
    assert not any(x.is_inference() for x in found(band, 7, 20, CPU))
    assert max(gaps(compiled(*inputs, 7, None), banded(*inputs, 7, None), inputs)) < 1e-4


@pytest.mark.usefixtures("no_masks")
def test_a_core_holds_no_mask() -> None:
    """Nothing that a copy, a shard or a checkpoint would have to carry."""
    core = Windowed(heads(4, 2, 8), 7)
    twin = copy.deepcopy(core)
    assert not [*core.buffers(), *core.parameters()]
    assert not core.state_dict()
    inputs = qkv()
    assert torch.equal(core(*inputs), twin(*inputs))
    assert len(blocks(band, 7, 20, CPU)) == len(BLOCKS)
    assert blocks(band, 7, 20, CPU)[0] is blocks(band, 7, 20, CPU)[0]


@unfused
def test_a_block_compiles_with_it_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    layer = shake(block(attention=attention(core=partial(Windowed, window=9)))(SITE)).requires_grad_(False)
    x = 3 * torch.randn(2, 23, D)
    y = layer(x, carry_of(x))
    monkeypatch.setattr(core_window, "banded", flex)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    assert (compiled(x, carry_of(x)) - y).abs().max() < 1e-5


@pytest.mark.parametrize("cap", [None, 3.0])
def test_which_form_runs(monkeypatch: pytest.MonkeyPatch, cap: float | None) -> None:
    monkeypatch.setattr(core_window, "fused_or", lambda form, twin, *given: (form, twin, given))
    q, k, v = torch.empty(3, 1, 4, 5, 8)
    assert Windowed(heads(4, 2, 8), 7, cap).forward(q, k, v) == (flex, banded, (q, k, v, 7, cap))
    core = Windowed(Heads(Site(64, 1, 0, 61, 32), 4, 2, 16), 7, cap)
    assert core.kernel(torch.device("cuda"), torch.bfloat16, 32) == "flex"
    assert core.kernel(CPU, torch.bfloat16, 32) == core.kernel(torch.device("cuda"), torch.float64, 32)
