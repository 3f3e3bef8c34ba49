"""The generalized delta rule by chunks: equal to the loop, whatever the keys, the decay, the lengths and the pieces."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from naive_delta import naive_dplr
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blagpt_pl.nn.recurrent.delta import dplr, inverse_of_unit

B, H, K, V = 2, 3, 8, 6
SHAPES = [(1, 32), (2, 32), (13, 4), (37, 1), (37, 16), (37, 32), (64, 16), (130, 64)]  # tokens, and steps of a chunk
KINDS = ("as RWKV-7 starts", "strongest decay", "one key over and over", "any a and b")


def inputs(tokens: int, kind: str = KINDS[0], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """r, log_w, k, v, a, b; of the kinds but the last, a and b are those of RWKV-7, keys of unit length."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    r, k, v = normal(B, tokens, H, K), normal(B, tokens, H, K), normal(B, tokens, H, V)
    log_w = -torch.exp(torch.tensor(-0.5)) * torch.sigmoid(normal(B, tokens, H, K) + 20 * (kind == KINDS[1]))
    same = kind == KINDS[2]
    key = F.normalize(normal(B, 1 if same else tokens, H, K).expand(B, tokens, H, K), dim=-1)
    rate = torch.full_like(key, 0.9999) if same else torch.sigmoid(normal(B, tokens, H, K))
    if same:
        log_w = log_w * 1e-4  # nothing is forgotten
    a, b = (normal(B, tokens, H, K) / 3, normal(B, tokens, H, K) / 3) if kind == KINDS[3] else (-key, key * rate)
    return [x.to(dtype) for x in (r, log_w, k, v, a, b)]


def both(arguments: list[Tensor], chunk: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the fast form and the loop give: y, the last state, and every gradient of a random sum of both."""
    found = []
    for run in (lambda *x: dplr(*x, chunk=chunk), naive_dplr):
        leaves = [x.detach().clone().requires_grad_() for x in arguments]
        y, state = run(*leaves)
        generator = torch.Generator().manual_seed(9)
        total = sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in (y, state))
        found.append([y, state, *torch.autograd.grad(total, leaves)])
    return found[0], found[1]


def scaled_gap(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def memory(seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, H, K, V, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "chunk"), SHAPES)
def test_it_is_the_loop(tokens: int, chunk: int, kind: str) -> None:
    for start in ([], [memory()]):
        fast, slow = both([*inputs(tokens, kind), *start], chunk)
        assert max(map(scaled_gap, fast, slow)) < 1e-10


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("tokens", [37, 300])
def test_float32_is_enough(tokens: int, kind: str) -> None:
    fast, slow = both([*inputs(tokens, kind, torch.float32), memory(dtype=torch.float32)], 32)
    assert max(map(scaled_gap, fast, slow)) < 2e-5
    assert all(x.dtype == torch.float32 for x in fast)


@pytest.mark.parametrize("sizes", [(37, 27), (1,) * 9, (5, 1, 1, 30, 33)])
def test_pieces_are_the_whole(sizes: tuple[int, ...]) -> None:
    whole = inputs(sum(sizes))
    expected, last = dplr(*whole, memory())
    state, found = memory(), []
    for piece in zip(*(x.split(sizes, dim=1) for x in whole), strict=True):
        y, state = dplr(*piece, state)
        found.append(y)
    assert scaled_gap(torch.cat(found, 1), expected) < 1e-12 and scaled_gap(state, last) < 1e-12


def test_later_steps_change_nothing_before_them() -> None:
    one, other = inputs(70), inputs(70, seed=1)
    for t in (1, 31, 32, 33, 69):
        mixed = [torch.cat((x[:, :t], y[:, t:]), 1) for x, y in zip(one, other, strict=True)]
        gap = dplr(*one)[0][:, :t] - dplr(*mixed)[0][:, :t]
        assert gap.abs().max() < 1e-12


@pytest.mark.parametrize("size", [1, 2, 16, 64])
@pytest.mark.parametrize("worst", [False, True])
def test_the_inverse_is_as_stable_as_substitution(size: int, worst: bool) -> None:
    """With keys that repeat A is -1 everywhere below the diagonal; its powers are binomials, its inverse has but 1 and -1."""
    below = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1)) / size**0.5
    below = -torch.ones(3, size, size) if worst else below
    found = inverse_of_unit(below)  # what is not below the diagonal is not read
    unit = torch.eye(size, dtype=torch.float64) - below.double().tril(-1)
    expected = torch.linalg.solve_triangular(
        unit, torch.eye(size).double().expand_as(unit), upper=False, unitriangular=True
    )
    assert scaled_gap(found, expected) < 1e-6
    power, squared = below.tril(-1), torch.eye(size) + below.tril(-1)
    for _ in range((size - 1).bit_length() - 1):
        power = power @ power
        squared = squared + power @ squared
    assert (size < 64 or not worst) == (scaled_gap(squared, expected) < 1)  # the short way that is none


def test_bfloat16_goes_in_and_out_and_the_rest_is_wide() -> None:
    exact = inputs(37)
    half = [x.bfloat16() for x in exact]
    with torch.autocast("cpu", torch.bfloat16):
        y, state = dplr(*half)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert scaled_gap(y.double(), naive_dplr(*half)[0]) < 1e-2
    assert scaled_gap(state.double(), naive_dplr(*half)[1]) < 2e-5


class Run(torch.nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return dplr(*x)[0]


def test_it_traces_whole() -> None:
    torch._dynamo.reset()
    arguments = inputs(19, dtype=torch.float32)  # one chunk
    compiled = torch.compile(Run(), backend="aot_eager", fullgraph=True)
    assert (compiled(*arguments) - Run()(*arguments)).abs().max() < 1e-6
    torch._dynamo.reset()


def reference() -> ModuleType:
    """flash-linear-attention's own naive form; the package itself does not import without Triton."""
    pytest.importorskip("einops")
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("fla-core is not installed")
    path = Path(found.origin).parent / "ops" / "generalized_delta_rule" / "dplr" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_dplr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_the_naive_form_of_flash_linear_attention() -> None:
    """Heads first, in float32, r scaled by K^-½."""
    naive = reference()
    r, log_w, k, v, a, b = inputs(37, dtype=torch.float32)
    arguments = [x.transpose(1, 2) for x in (r * K**0.5, k, v, a, b, log_w)]
    expected, state = naive.dplr_recurrence(*arguments, output_final_state=True)
    y, last = dplr(r, log_w, k, v, a, b)
    assert scaled_gap(y, expected.transpose(1, 2)) < 2e-5 and scaled_gap(last, state) < 2e-5


@pytest.mark.parametrize("chunk", [8, 32])
def test_its_cost_is_linear_and_as_said(chunk: int) -> None:
    expected = chunk * (6 * K + 4 * V) + K * (K + 3 * V) + K * K * V // chunk + (chunk**2 - 4) // 3
    for tokens in (64, 256):
        with FlopCounterMode(display=False) as counter:
            dplr(*inputs(tokens), chunk=chunk)
        assert counter.get_total_flops() == 2 * B * H * tokens * expected


def test_a_chunks_decay_may_reach_e_to_minus_165() -> None:
    generator = torch.Generator().manual_seed(1)
    r, _, k, v, a, b = torch.randn(6, 1, 32, 2, 8, dtype=torch.float64, generator=generator)
    given = [r, torch.full_like(r, -165 / 32), k, v, a / 9, b / 9]
    exact, _ = dplr(*given, chunk=1)
    found, state = dplr(*(t.float() for t in given), chunk=32)
    assert state.isfinite().all()
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
