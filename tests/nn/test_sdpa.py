"""Plain attention: which kernel runs, in which order they are tried, that nothing of torch's is left changed, that K/V stay G."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import SITE, attention, block, heads, tiny
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.nn.attention import backends
from blagpt_pl.nn.attention.backends import HOPPER, ON_HOPPER, backend_used, kernels, reordered
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.base import Core, Heads

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
FLAGS = {
    cuda.cudnn_sdp_enabled: cuda.enable_cudnn_sdp,
    cuda.flash_sdp_enabled: cuda.enable_flash_sdp,
    cuda.mem_efficient_sdp_enabled: cuda.enable_mem_efficient_sdp,
    cuda.math_sdp_enabled: cuda.enable_math_sdp,
}


def qkv(n: int = 4, n_kv: int = 2, dim: int = 8, values: int = 8, length: int = 13, **kind: object) -> list[Tensor]:
    kind = {"dtype": torch.float64, **kind}
    return [torch.randn(2, x, length, w, **kind).requires_grad_() for x, w in ((n, dim), (n_kv, dim), (n_kv, values))]


def state() -> tuple:
    """What of torch a choice of kernels could leave behind."""
    return [enabled() for enabled in FLAGS], torch._C._get_sdp_priority_order()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a Hopper: kernels are ordered as there."""
    monkeypatch.setattr(backends, "reordered", torch.compiler.assume_constant_result(lambda device: True))


@contextmanager
def turned_off(enabled: Callable) -> Iterator[None]:
    FLAGS[enabled](False)
    try:
        yield
    finally:
        FLAGS[enabled](True)


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Over the T x T matrix, keys and values repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~past, -torch.inf).softmax(-1) @ v


class Ran(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- the order


@pytest.mark.parametrize(
    ("capability", "expected"), [(HOPPER, True), ((8, 0), False), ((10, 0), False), ((0, 0), False)]
)
def test_the_order_is_changed_on_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(backends, "capability", lambda device: capability)
    assert reordered(CUDA) == expected
    assert not reordered(CPU)
    assert not reordered(torch.device("meta"))


def test_without_cuda_there_is_no_capability() -> None:
    """Tensors without memory may say that they are on a device that is not there."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert not reordered(CUDA)


def test_the_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or HOPPER)
    backends.capability.cache_clear()
    try:
        assert [reordered(CUDA) for _ in range(3)] == [True] * 3
        assert asked == [CUDA]
    finally:
        backends.capability.cache_clear()


def test_all_kernels_are_in_the_order_so_that_one_always_takes_it() -> None:
    assert ON_HOPPER[0] == SDPBackend.CUDNN_ATTENTION
    assert set(ON_HOPPER) == {*SDPBackend.__members__.values()} - {SDPBackend.ERROR, SDPBackend.OVERRIDEABLE}
    assert len(ON_HOPPER) == len(FLAGS)


@pytest.mark.parametrize("enabled", FLAGS, ids=lambda f: f.__name__)
def test_whoever_turned_a_kernel_off_has_chosen(monkeypatch: pytest.MonkeyPatch, enabled: Callable) -> None:
    """The order would turn it on again."""
    monkeypatch.setattr(backends, "capability", lambda device: HOPPER)
    with turned_off(enabled):
        assert not reordered(CUDA)
    assert reordered(CUDA)


@pytest.mark.usefixtures("hopper")
def test_within_the_call_the_order_is_ours_and_afterwards_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before, plain = state(), torch.nn.functional.scaled_dot_product_attention
    seen = []

    def spy(*args: object, **kwargs: object) -> Tensor:
        seen.append(state())
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    core, inputs = SDPA(heads(4, 2, 8)), qkv()
    core(*inputs)
    assert seen[0][0] == [True] * 4
    assert seen[0][1][:4] == [int(kernel) for kernel in ON_HOPPER] != before[1][:4]
    assert state() == before
    with pytest.raises(RuntimeError):
        core(inputs[0][..., :5], *inputs[1:])
    assert state() == before


@pytest.mark.usefixtures("hopper")
def test_it_traces_as_one_graph_and_leaves_nothing_behind() -> None:
    torch._dynamo.reset()
    before, inputs, graphs = state(), qkv(length=19), []
    core = SDPA(heads(4, 2, 8))
    expected = naive(*inputs)
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    seen = torch.compile(core, backend=lambda g, _: graphs.append(g) or g, fullgraph=True, dynamic=False)
    assert (seen(*inputs) - expected).abs().max() < 1e-12
    (code,) = (graph.code for graph in graphs)
    assert code.index("'CUDNN_ATTENTION'") < code.index("'FLASH_ATTENTION'") < code.index("scaled_dot_product")
    assert state() == before
    lowered = aot_autograd(fw_compiler=lambda g, _: graphs.append(g) or make_boxed_func(g))
    y = torch.compile(core, backend=lowered, fullgraph=True, dynamic=False)(*inputs)
    assert (y - expected).abs().max() < 1e-12
    for mine, twin in zip(torch.autograd.grad(y.square().sum(), inputs), grads, strict=True):
        assert (mine - twin).abs().max() < 1e-11
    forward, backward = (graph.code for graph in graphs[1:])
    assert "_scaled_dot_product_flash_attention_for_cpu" in forward
    assert "sdpa_kernel" not in forward + backward  # the kernel was chosen while tracing; a step sets nothing
    assert state() == before


@pytest.mark.usefixtures("hopper")
def test_a_block_traces_with_it() -> None:
    torch._dynamo.reset()
    model = tiny().eval()
    tokens = torch.randint(61, (2, 17))
    expected = model(tokens)
    for layer in model.blocks:
        layer.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    assert (model(tokens) - expected).abs().max() < 1e-5


def test_where_there_is_nothing_to_choose_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "sdpa_kernel", None)  # any use would fail
    core, inputs = SDPA(heads(4, 2, 8)), qkv()
    with torch.no_grad(), Ran() as ran:
        core(*inputs)
    assert ran.names == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert backend_used(*inputs) == "flash (CPU)"
    graphs = []
    torch.compile(core, backend=lambda g, _: graphs.append(g) or g, fullgraph=True, dynamic=False)(*inputs)
    assert [node.op for node in graphs[0].graph.nodes].count("call_function") == 1


# ---------------------------------------------------------------------- what runs


@pytest.mark.parametrize(
    ("values", "dropout", "expected", "op"),
    [
        (8, 0.0, "flash (CPU)", "_scaled_dot_product_flash_attention_for_cpu"),
        (8, 0.1, "math", "_safe_softmax"),
        (12, 0.0, "math", "_safe_softmax"),
    ],
)
def test_what_is_reported_is_what_runs(values: int, dropout: float, expected: str, op: str) -> None:
    core, inputs = SDPA(Heads(SITE, 4, 2, 8, values), dropout), qkv(values=values)
    assert backend_used(*inputs, dropout=dropout) == core.kernel(CPU, torch.float64, 13) == expected
    with Ran() as ran:
        core(*inputs)
    assert op in ran.names


@pytest.mark.usefixtures("hopper")
def test_the_report_is_of_the_same_order_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = state(), []
    chosen = torch._fused_sdp_choice
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **k: seen.append(state()) or chosen(*a, **k))
    assert backend_used(*qkv()) == "flash (CPU)"
    assert seen[0][1][:4] == [int(kernel) for kernel in ON_HOPPER]
    assert state() == before


def test_a_user_s_own_choice_is_reported() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        assert backend_used(*qkv()) == SDPA(heads(4, 2, 8)).kernel(CPU, torch.float32, 13) == "math"


def test_a_model_says_what_its_cores_run_by() -> None:
    dilated = partial(Dilated, segments=[8, 16], dilations=[1, 2])
    say = partial(kernels, kind=Core, device=CPU, dtype=torch.float32, tokens=32)
    assert say(tiny()) == "flash (CPU)"
    assert say(tiny(block=block(attention=attention(core=SoftCapped)))) == "scores in memory"
    assert say(tiny(block=block(attention=attention(core=dilated)))) == "Dilated"
    mixed = tiny(n_layers=3)
    mixed.blocks[1].attention.part.core = SDPA(heads(4, 2, 8), dropout=0.1)
    assert say(mixed) == "flash (CPU) x 2, math x 1"
    assert say(torch.nn.Linear(2, 2)) == ""


# ---------------------------------------------------------------------- grouped heads


@pytest.mark.parametrize(("n", "n_kv"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("values", [8, 5])
def test_grouped_heads_read_as_repeated_ones(n: int, n_kv: int, values: int) -> None:
    inputs = qkv(n, n_kv, values=values)
    mine, twin = SDPA(Heads(SITE, n, n_kv, 8, values))(*inputs), naive(*inputs)
    assert (mine - twin).abs().max() < 1e-12
    weight = torch.randn_like(twin)
    for a, b in zip(*(torch.autograd.grad(y, inputs, weight) for y in (mine, twin)), strict=True):
        assert (a - b).abs().max() < 1e-11


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes kept for the backward pass, each storage once."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_keys_and_values_are_kept_once_a_group(n_kv: int) -> None:
    """q, k, v as they came, the result and one float32 a query; repeated, 4 heads of keys and values would be kept."""
    inputs = qkv(4, n_kv, 16, 16, length=64, dtype=torch.float32)
    row = 2 * 64 * 16 * 4  # bytes of one head
    least = (4 + 2 * n_kv + 4) * row
    assert saved_bytes(lambda: SDPA(heads(4, n_kv, 16))(*inputs)) == least + 2 * 4 * 64 * 4
    k, v = (x.repeat_interleave(4 // n_kv, dim=1) for x in inputs[1:])
    assert saved_bytes(lambda: SDPA(heads(4, 4, 16))(inputs[0], k, v)) == 16 * row + 2 * 4 * 64 * 4
