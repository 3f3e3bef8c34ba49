"""SSD by chunks: equal to the recurrence token by token, whatever the lengths, groups, states and decays."""

import naive_ssd
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from blagpt_pl.nn.recurrent.ssd import ssd

B, H, P, N = 2, 4, 6, 5


def inputs(length: int, groups: int, strong: float = 1.0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, log decay, b, c and a state to begin with, of the recurrence."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decay = -strong * torch.rand(B, length, H, generator=generator, dtype=torch.float64)
    b, c = normal(B, length, groups, N), normal(B, length, groups, N)
    found = [normal(B, length, H, P), decay, b, c, normal(B, H, P, N)]
    return [t.to(dtype).requires_grad_() for t in found]


def outcome(f: object, given: list[Tensor], with_state: bool, **options: int) -> list[Tensor]:
    """What it returns, and the gradients of a sum of both that is weighted at random."""
    used = given if with_state else given[:-1]
    y, state = f(*used, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, state)]
    total = sum((w * t).sum() for w, t in zip(weights, (y, state), strict=True))
    return [y, state, *torch.autograd.grad(total, used)]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 16, 37])
def test_it_is_the_recurrence(length: int, with_state: bool, groups: int) -> None:
    given = inputs(length, groups)
    found = outcome(ssd, given, with_state, chunk=8)
    expected = outcome(naive_ssd.ssd, given, with_state)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float64 and (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("chunk", [1, 3, 37, 64])
def test_the_chunk_is_a_matter_of_speed_alone(chunk: int) -> None:
    given = inputs(37, 2)
    for a, b in zip(outcome(ssd, given, True, chunk=chunk), outcome(naive_ssd.ssd, given, True), strict=True):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("strong", [0.01, 1.0, 30.0, 2000.0])
def test_float32(strong: float) -> None:
    """From hardly forgetting to forgetting all at once, where a mask after the exp would be inf · 0."""
    exact = outcome(naive_ssd.ssd, inputs(150, 2, strong), True)
    found = outcome(ssd, inputs(150, 2, strong, torch.float32), True)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all()
        assert (a - b).abs().max() < 2e-5 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("cuts", [[1] * 37, [8, 16, 13], [36, 1], [1, 36], [5, 9, 23]])
def test_pieces_are_the_whole(cuts: list[int]) -> None:
    *given, state = inputs(37, 2)
    whole, last = ssd(*given, state, chunk=8)
    found = []
    for piece in zip(*(t.split(cuts, dim=1) for t in given), strict=True):
        y, state = ssd(*piece, state, chunk=8)
        found.append(y)
    assert (torch.cat(found, 1) - whole).abs().max() < 1e-12
    assert (state - last).abs().max() < 1e-12


def test_it_is_linear_in_what_is_written() -> None:
    x, a, b, c, state = inputs(20, 2)
    double, _ = ssd(2 * x, a, b, c, 2 * state, chunk=8)
    assert (double - 2 * ssd(x, a, b, c, state, chunk=8)[0]).abs().max() < 1e-12


def test_without_forgetting_it_is_linear_attention() -> None:
    x, a, b, c, _ = inputs(20, 1)
    y, _ = ssd(x, 0 * a, b, c, chunk=8)
    scores = (c[:, :, 0] @ b[:, :, 0].mT).tril()  # (B, T, T)
    assert (y - torch.einsum("bts,bshp->bthp", scores, x)).abs().max() < 1e-11


def test_autocast_does_not_reach_it() -> None:
    given = inputs(37, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = ssd(*given, chunk=8)
    plain = ssd(*given, chunk=8)
    assert torch.equal(y, plain[0]) and torch.equal(state, plain[1])


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    given = [t.detach().bfloat16() for t in inputs(37, 2)]
    y, state = ssd(*given, chunk=8)
    exact = naive_ssd.ssd(*(t.double() for t in given))
    assert y.dtype == state.dtype == torch.float32
    assert (y - exact[0]).abs().max() < 2e-5 * exact[0].abs().max()


def test_inputs_are_left_as_they_were() -> None:
    given = [t.detach() for t in inputs(16, 2)]
    before = [t.clone() for t in given]
    ssd(*given, chunk=8)
    assert all(map(torch.equal, given, before))


def test_it_is_one_graph() -> None:
    given = inputs(21, 2)
    torch._dynamo.reset()
    compiled = torch.compile(ssd, backend="aot_eager", fullgraph=True, dynamic=False)
    for a, b in zip(outcome(compiled, given, True, chunk=8), outcome(ssd, given, True, chunk=8), strict=True):
        assert (a - b).abs().max() < 1e-12
    torch._dynamo.reset()


def test_its_cost_is_linear_in_the_length() -> None:
    """2 L P + 4 P N of a token and head, 2 L N of a token and group; exactly, where the chunk divides the length."""
    for length in (16, 32, 64):
        with FlopCounterMode(display=False) as counted:
            ssd(*(t.to("meta") for t in inputs(length, 2)), chunk=8)
        assert counted.get_total_flops() == B * length * (H * (2 * 8 * P + 4 * P * N) + 2 * 2 * 8 * N)
