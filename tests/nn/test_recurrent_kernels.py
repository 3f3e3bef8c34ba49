"""The Triton kernels as operations of torch: what they are called with, by a stand-in for the package on CPU, and (GPU) themselves."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
from helpers import attention, carry_of, shake
from torch import Tensor

from blagpt_pl.nn.attention.backends import kernels as said
from blagpt_pl.nn.base import Carry, Core, SequenceMixer, Site
from blagpt_pl.nn.recurrent import delta, kernels
from blagpt_pl.nn.recurrent.delta import dplr
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.recurrent.rwkv7 import RWKV7TimeMix
from blagpt_pl.nn.recurrent.ssd import ssd
from blagpt_pl.nn.states import States

CALLS: list[dict] = []
SITE = Site(d_model=32, n_layers=2, layer=0, vocab_size=61, context=32)


def as_kernel(twin: object) -> type[torch.autograd.Function]:
    """A function of tensors as the package has its kernels: one node of autograd, whose backward is its own."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            assert all(t.is_contiguous() for t in tensors)
            ctx.save_for_backward(*tensors)
            return twin(*tensors)

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, ...]:
            def by_hand() -> tuple[Tensor, ...]:
                leaves = [t.detach().requires_grad_() for t in saved]
                return torch.autograd.grad(twin(*leaves), leaves, grads)

            saved = ctx.saved_tensors
            with ThreadPoolExecutor(1) as elsewhere:  # where autograd is on: within an operation it is not
                return elsewhere.submit(by_hand).result()

    return Kernel


def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """o_t = S_tᵀ q_t, S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, S (K, V): the package's SSD, step by step."""
    s, out = state, []
    for t in range(q.shape[1]):
        s = g[:, t, :, None, None].exp() * s + k[:, t, :, :, None].to(s) * v[:, t, :, None].to(s)
        out.append((q[:, t, :, None].to(s) @ s)[:, :, 0])
    return torch.stack(out, dim=1).to(q.dtype), s


def wkv(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S_t = diag(e^{w_t}) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ;  o_t = S_tᵀ r_t."""
    s, out = state, []
    for t in range(r.shape[1]):
        rt, kt, vt, at, bt = (x[:, t].to(s) for x in (r, k, v, a, b))
        s = w[:, t, :, :, None].exp() * s + bt[..., None] * (at[:, :, None] @ s) + kt[..., None] * vt[:, :, None]
        out.append((rt[:, :, None] @ s)[:, :, 0])
    return torch.stack(out, dim=1).to(v.dtype), s


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor]:
    CALLS.append({"products": q.dtype, "decay": g.dtype})
    assert scale == 1.0 and output_final_state and g_gamma is None
    assert q.shape == k.shape and q.shape[:3] == v.shape[:3] == g.shape
    assert initial_state.shape == (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    assert q.dtype == k.dtype == v.dtype
    return as_kernel(gla).apply(q, k, v, g, initial_state)


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    safe_gate: bool = False,
    chunk_size: int | None = None,
    lower_bound: float | None = None,
) -> tuple[Tensor, Tensor]:
    CALLS.append({"products": r.dtype, "decay": w.dtype})
    assert scale == 1.0 and output_final_state and safe_gate and chunk_size == 64
    assert (w <= 0).all() and (w >= lower_bound - 1e-6).all()
    assert r.dtype == k.dtype == v.dtype == a.dtype == b.dtype
    return as_kernel(wkv).apply(r, w, k, v, a, b, initial_state)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `fla` with two functions, said to run on CPU."""
    for name, function in (("simple_gla", chunk_simple_gla), ("rwkv7", chunk_rwkv7)):
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setattr(kernels, "available", lambda device, dtype=torch.float32: dtype != torch.float64)
    CALLS.clear()


def inputs_of(operation: object, groups: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs of an operation and a start, all to be differentiated by."""
    shapes = {ssd: [(2, 7, 4, 5), (2, 7, 4), (2, 7, groups, 3), (2, 7, groups, 3)], dplr: [(2, 7, 4, 5)] * 6}
    given = [torch.randn(shape) for shape in shapes[operation]]
    given[1] = -0.6 * given[1].sigmoid()
    state = torch.randn((2, 4, 5, 3) if operation is ssd else (2, 4, 5, 5))
    return [t.requires_grad_() for t in given], [state.requires_grad_()]


def outcome(run: object, given: list[Tensor]) -> list[Tensor]:
    y, state = run(*given)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape), torch.linspace(1, -1, state.numel())
    total = (y * weights[0]).sum() + (state.flatten() * weights[1]).sum()
    return [y, state, *torch.autograd.grad(total, given)]


@pytest.mark.parametrize(("fast", "twin"), [(kernels.ssd, ssd), (kernels.dplr, dplr)], ids=["ssd", "dplr"])
@pytest.mark.parametrize("form", ["eager", "aot_eager"])
@pytest.mark.usefixtures("package")
def test_it_is_the_twin(fast: object, twin: object, form: str) -> None:
    inputs, start = inputs_of(twin)
    run = fast if form == "eager" else torch.compile(fast, backend=form, fullgraph=True)
    for given in (inputs, inputs + start):  # from nothing, and from a state
        for mine, other in zip(outcome(run, given), outcome(twin, given), strict=True):
            assert (mine - other).abs().max() < 2e-5 * other.abs().max().clamp(min=1)
    assert CALLS and all(call == {"products": torch.float32, "decay": torch.float32} for call in CALLS)
    torch._dynamo.reset()


@pytest.mark.parametrize(("fast", "twin"), [(kernels.ssd, ssd), (kernels.dplr, dplr)], ids=["ssd", "dplr"])
@pytest.mark.usefixtures("package")
def test_products_are_autocasts_and_decays_are_not(fast: object, twin: object) -> None:
    inputs, start = inputs_of(twin)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = fast(*inputs, *start)
    assert (y.dtype, state.dtype) == (torch.float32, torch.float32)
    assert CALLS == [{"products": torch.bfloat16, "decay": torch.float32}]
    (y.sum() + state.sum()).backward()
    assert all(t.grad.isfinite().all() and t.grad.dtype == torch.float32 for t in inputs + start)
    exact, _ = twin(*inputs, *start)
    assert (y - exact).abs().max() < 3e-2 * exact.abs().max()


@pytest.mark.usefixtures("package")
def test_torch_agrees_that_they_are_operations() -> None:
    q, k, v, g = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 5), -torch.rand(1, 3, 2)
    given = [t.requires_grad_() for t in (q, k, v, g, torch.randn(1, 2, 4, 5))]
    torch.library.opcheck(kernels._ssd, given)
    r, w, k, v, a, b = torch.randn(6, 1, 3, 2, 4)
    given = [t.detach().requires_grad_() for t in (r, -0.5 * w.sigmoid(), k, v, a, b, torch.randn(1, 2, 4, 4))]
    torch.library.opcheck(kernels._delta, given)


@pytest.mark.parametrize("part", [Mamba2, RWKV7TimeMix])
def test_a_part_runs_it_where_it_is_at_hand(part: type, request: pytest.FixtureRequest) -> None:
    mixer = part(SITE, head_dim=8)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    x = torch.randn(2, 11, 32)
    carry = Carry(torch.zeros(2, 11, dtype=torch.int64), x)
    plain = mixer(x, carry)
    assert kernels.NAME not in mixer.kernel(x.device, x.dtype, 32)
    request.getfixturevalue("package")
    with_kernel = mixer(x, carry)
    assert len(CALLS) == 1
    assert (plain - with_kernel).abs().max() < 2e-5 * plain.abs().max()
    assert kernels.NAME in mixer.kernel(x.device, x.dtype, 32)
    mixer.double()(x.double(), Carry(carry.tokens, x.double()))
    assert len(CALLS) == 1  # float64 is the twin's


@pytest.mark.usefixtures("package")
def test_what_runs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of the log and of result.json: by the parts that say something, and nothing where there are none."""
    mixers = torch.nn.ModuleList([Mamba2(SITE, head_dim=8), Mamba2(SITE, head_dim=8), attention()(SITE)])
    where = (SequenceMixer, torch.device("cpu"), torch.float32, 32)
    assert said(mixers, *where) == kernels.NAME
    monkeypatch.undo()
    mixers[1] = RWKV7TimeMix(SITE, head_dim=8)
    assert said(mixers, *where) == "chunks of 32"
    assert said(mixers[2], *where) == ""
    assert said(mixers, Core, *where[1:]) == "flash (CPU)"


def test_where_it_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INSTALLED", True)
    assert kernels.available(torch.device("cuda"))
    assert not kernels.available(torch.device("cuda"), torch.float64)
    assert not kernels.available(torch.device("cpu")) and not kernels.available(torch.device("meta"))
    monkeypatch.setattr(kernels, "INSTALLED", False)
    assert not kernels.available(torch.device("cuda"))
    assert pytest.approx(-(2.718281828459045**-0.5)) == kernels.SLOWEST
    assert delta.CHUNK >= 16


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1000, 1024])
@pytest.mark.parametrize(("fast", "twin"), [(kernels.ssd, ssd), (kernels.dplr, dplr)], ids=["ssd", "dplr"])
def test_the_kernel_is_close_to_the_twin_in_float64(fast: object, twin: object, length: int) -> None:
    if not kernels.INSTALLED:
        pytest.skip("flash-linear-attention is not installed")
    shape = (2, length, 4, 64)
    given = [torch.randn(shape, device="cuda") / 8 for _ in range(6 if twin is dplr else 4)]
    if twin is dplr:
        kappa = torch.nn.functional.normalize(given[2], dim=-1)
        given[1] = -0.6 * given[1].sigmoid()
        given[4], given[5] = -kappa, kappa * given[5].sigmoid()
    else:
        given[1] = -given[1][..., 0].sigmoid()
    given = [t.bfloat16().float().requires_grad_() for t in given]
    with torch.autocast("cuda", torch.bfloat16):
        mine = outcome(fast, given)
    exact = outcome(twin, [t.detach().double().requires_grad_() for t in given])
    for i, (a, b) in enumerate(zip(mine, exact, strict=True)):
        assert (a - b).abs().max() < (1e-2 if i == 0 else 2e-2) * b.abs().max()


@pytest.mark.parametrize("part", [Mamba2, RWKV7TimeMix])
def test_a_part_gives_the_kernel_its_state(part: type, request: pytest.FixtureRequest) -> None:
    mixer, x, found = shake(part(SITE, head_dim=8), 0.2), torch.randn(2, 11, 32), []
    plain, states = mixer(x, carry_of(x)), States()
    request.getfixturevalue("package")
    for piece in x.split([4, 7], dim=1):
        found.append(mixer(piece, Carry(carry_of(piece).tokens, piece, states=states)))
        states = states.after(piece.shape[1])
    assert len(CALLS) == 2
    assert (torch.cat(found, dim=1) - plain).abs().max() < 2e-5 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [Mamba2, RWKV7TimeMix])
@pytest.mark.usefixtures("package")
def test_weights_of_16_bit_run_it_too(part: type, dtype: torch.dtype) -> None:
    mixer, x = part(SITE, head_dim=8).to(dtype), torch.randn(2, 11, 32, dtype=dtype)
    y = mixer(x, carry_of(x))
    y.float().sum().backward()
    assert CALLS and y.dtype == dtype
    assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.grad is not None)
