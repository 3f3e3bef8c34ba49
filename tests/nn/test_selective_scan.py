"""The selective scan: equal to its definition, forwards and backwards, at any length, decay and chunk."""

from types import ModuleType

import pytest
import torch
from naive_selective_scan import scan
from torch import Tensor

from blagpt_pl.nn.recurrent import scan_parallel, scan_serial
from blagpt_pl.nn.recurrent import selective_scan as module
from blagpt_pl.nn.recurrent.selective_scan import selective_scan

LENGTHS = [1, 7, 16, 23, 48]  # one, primes below and above a chunk, multiples
NAMES = ("x", "dt", "a", "b", "c", "state")


def inputs(length: int, channels: int = 5, n: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, dt, a, b, c, state of two sequences; decays from none to all of it."""
    generator = torch.Generator().manual_seed(length)
    shapes = {"x": (2, length, channels), "b": (2, length, n), "c": (2, length, n), "state": (2, channels, n)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made["dt"] = torch.randn(2, length, channels, generator=generator, dtype=torch.float64).mul(2).exp()
    made["a"] = -torch.rand(channels, n, generator=generator, dtype=torch.float64).mul(4)
    return [made[name].to(dtype).requires_grad_() for name in NAMES]


def values_and_gradients(run: object, given: list[Tensor]) -> list[Tensor]:
    """y, the last state, and the gradients of both by all that was given."""
    y, state = run(*given)
    weights = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for t in (y, state)
    ]
    loss = sum((t * w.to(t.dtype)).sum() for t, w in zip((y, state), weights, strict=True))
    return [y, state, *torch.autograd.grad(loss, given)]


def gaps(mine: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """Of each pair, over what is largest in it."""
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(mine, theirs, strict=True)]


@pytest.fixture(params=[scan_serial, scan_parallel], ids=["serial", "parallel"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Everything holds of both forms; each device has one."""
    monkeypatch.setattr(module, "run", lambda name, *given: getattr(request.param, name)(*given))
    return request.param


@pytest.mark.parametrize("chunk", [1, 4, 16])
@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_its_definition(length: int, chunk: int) -> None:
    given = inputs(length)
    mine = values_and_gradients(lambda *given: selective_scan(*given, chunk=chunk), given)
    assert max(gaps(mine, values_and_gradients(scan, given))) < 1e-12


@pytest.mark.parametrize("length", [23, 64])
def test_it_is_its_definition_in_float32(length: int) -> None:
    mine = values_and_gradients(selective_scan, inputs(length, dtype=torch.float32))
    assert all(t.dtype == torch.float32 for t in mine)
    assert max(gaps([t.double() for t in mine], values_and_gradients(scan, inputs(length)))) < 2e-5


def test_gradients_are_those_of_the_values() -> None:
    assert torch.autograd.gradcheck(lambda *given: selective_scan(*given, chunk=3), inputs(7, channels=2, n=2))


def test_without_a_state_it_begins_at_zero() -> None:
    *given, state = inputs(9)
    for mine, theirs in zip(selective_scan(*given), scan(*given, state=torch.zeros_like(state)), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize("edges", [[1], [10], [5, 6, 21], list(range(1, 23))])
def test_pieces_are_the_whole(edges: list[int]) -> None:
    x, dt, a, b, c, state = inputs(23)
    whole, last = selective_scan(x, dt, a, b, c, state, chunk=4)
    found = []
    for piece in zip(*(t.tensor_split(edges, dim=1) for t in (x, dt, b, c)), strict=True):
        y, state = selective_scan(*piece[:2], a, *piece[2:], state, chunk=4)
        found.append(y)
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-12
    assert (state - last).abs().max() < 1e-12


@pytest.mark.parametrize("rate", [0.0, -1e4])
def test_no_decay_and_all_of_it_stay_finite(rate: float) -> None:
    """A form that divides by the decay of a chunk is inf or NaN here."""
    x, dt, a, b, c, state = inputs(40, dtype=torch.float32)
    a = torch.full_like(a, rate).requires_grad_()
    found = values_and_gradients(selective_scan, [x, dt, a, b, c, state])
    assert all(t.isfinite().all() for t in found)
    wide = [t.detach().double().requires_grad_() for t in (x, dt, a, b, c, state)]
    assert max(gaps([t.double() for t in found], values_and_gradients(scan, wide))) < 2e-5


def test_no_gradient_flows_back_from_the_future() -> None:
    x, dt, a, b, c, state = inputs(11)
    y, _ = selective_scan(x, dt, a, b, c, state, chunk=4)
    weights = torch.randn_like(y)
    for t in range(11):
        for by in torch.autograd.grad((y * weights)[:, t].sum(), (x, dt, b, c), retain_graph=True):
            assert not by[:, t + 1 :].any() and by[:, t].any()


def test_half_precision_comes_in_and_float32_goes_out_under_autocast_too() -> None:
    x, dt, a, b, c, state = (t.detach().bfloat16() for t in inputs(9))
    plain = selective_scan(x, dt, a, b, c, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = selective_scan(x, dt, a, b, c, state)
    assert all(t.dtype == torch.float32 for t in plain)
    assert all(map(torch.equal, plain, cast))


def test_it_keeps_its_inputs_and_the_states_between_chunks_alone() -> None:
    given, kept = inputs(48, channels=16, n=16, dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*given, chunk=8)
    states = 2 * 48 * 16 * 16
    assert sum(kept) <= sum(t.numel() for t in given) + states // 8 < states / 2


def test_it_is_one_graph() -> None:
    torch._dynamo.reset()
    given = inputs(11, dtype=torch.float32)
    compiled = torch.compile(lambda *given: selective_scan(*given, chunk=4), backend="aot_eager", fullgraph=True)
    found = gaps(
        values_and_gradients(compiled, given), values_and_gradients(lambda *g: selective_scan(*g, chunk=4), given)
    )
    torch._dynamo.reset()
    assert max(found) < 1e-6


def test_it_can_be_compiled_within_its_operations(form: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is on CUDA, in what is compiled itself."""
    if form is scan_serial:
        pytest.skip("a CPU's form, which writes into buffers")
    torch._dynamo.reset()
    given, compiled = inputs(7, dtype=torch.float32), []

    def run(name: str, *given: Tensor | int) -> object:
        compiled.append(name)
        return torch.compile(getattr(form, name), backend="aot_eager", fullgraph=True, dynamic=False)(*given)

    def scanned(*given: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*given, chunk=3)

    plain = values_and_gradients(scanned, given)
    monkeypatch.setattr(module, "run", run)
    outer = torch.compile(scanned, backend="aot_eager", fullgraph=True)
    found = gaps(values_and_gradients(outer, given), plain)
    torch._dynamo.reset()
    assert max(found) < 1e-6
    assert compiled == ["forwards", "backwards"]


def test_which_form_runs_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module, "fused", lambda function: lambda *given: ("fused", function))

    class OnCuda:
        is_cuda = True

    assert module.run("forwards", OnCuda()) == ("fused", scan_parallel.forwards)
    assert module.run("backwards", OnCuda()) == ("fused", scan_parallel.backwards)
    monkeypatch.setattr(scan_serial, "forwards", lambda *given: "serial")
    assert module.run("forwards", torch.zeros(1)) == "serial"


def test_what_torch_asks_of_an_operation() -> None:
    """Shapes without data, no aliases, gradients: as declared."""
    torch.library.opcheck(module.scan, (*inputs(7, channels=2, n=2), 3))
