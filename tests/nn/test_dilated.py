"""Dilated attention against one softmax with multiplicities, in float64, and against the paper's way to say it."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import SITE
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.base import Heads

Branches = list[tuple[int, int]]


def heads(n: int, n_kv: int, dim: int = 6, values: int | None = None, context: int = 4096) -> Heads:
    return Heads(replace(SITE, context=context), n, n_kv, dim, values)


def dilated(branches: Branches, n: int, n_kv: int, **changes: int) -> Dilated:
    return Dilated(heads(n, n_kv, **changes), [w for w, _ in branches], [r for _, r in branches])


def qkv(
    n: int, n_kv: int, length: int, dim: int = 6, values: int = 6, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    shapes = [(2, n, length, dim), (2, n_kv, length, dim), (2, n_kv, length, values)]
    return [(scale * torch.randn(s, dtype=torch.float64, generator=dice)).requires_grad_() for s in shapes]


def multiplicity(branches: Branches, n: int, length: int) -> Tensor:
    """c (H, T, T): in how many branches query i and key k meet, pair by pair."""
    c = torch.zeros(n, length, length, dtype=torch.float64)
    for w, r in branches:
        for h in range(n):
            for i in range(length):
                for k in range(i + 1):
                    both = (i % w) % r == h % r and (k % w) % r == h % r
                    c[h, i, k] += both and i // w == k // w
    return c


def one_softmax(q: Tensor, k: Tensor, v: Tensor, branches: Branches) -> Tensor:
    """The twin: Σ c e^s v / Σ c e^s over dense (T, T) matrices."""
    n, length = q.shape[1:3]
    k, v = (x.repeat_interleave(n // x.shape[1], dim=1) for x in (k, v))
    weight = multiplicity(branches, n, length) * (q @ k.mT / q.shape[-1] ** 0.5).exp()
    return weight @ v / weight.sum(-1, keepdim=True)


def branch_by_branch(q: Tensor, k: Tensor, v: Tensor, branches: Branches) -> Tensor:
    """The paper's words: a softmax in each segment of each branch, mixed by the denominators; loops, plain heads."""
    outputs = torch.zeros(len(branches), *v.shape, dtype=v.dtype)
    denominators = torch.zeros(len(branches), *v.shape[:3], 1, dtype=v.dtype)
    for j, (w, r) in enumerate(branches):
        for h in range(q.shape[1]):
            for begin in range(0, q.shape[2], w):
                rows = [t for t in range(begin, min(begin + w, q.shape[2])) if (t - begin) % r == h % r]
                for i, t in enumerate(rows):
                    e = (k[:, h, rows[: i + 1]] @ q[:, h, t, :, None] / q.shape[-1] ** 0.5).exp()  # (B, i + 1, 1)
                    denominators[j, :, h, t] = e.sum(1)
                    outputs[j, :, h, t] = (e / e.sum(1, keepdim=True) * v[:, h, rows[: i + 1]]).sum(1)
    return (outputs * denominators / denominators.sum(0)).sum(0)


def gaps(one: Tensor, other: Tensor, inputs: list[Tensor]) -> list[float]:
    """Largest differences of two results and of their gradients for q, k and v."""
    toward = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad(y, inputs, toward) for y in (one, other)]
    return [(one - other).abs().max().item(), *((a - b).abs().max().item() for a, b in zip(*grads, strict=True))]


@st.composite
def branch_lists(draw: st.DrawFn) -> Branches:
    """One to four branches, distinct, one of dilation 1 among them; dilations need not divide one another."""
    branch = st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 5, 8])).map(lambda x: (x[0] * x[1], x[1]))
    rest = draw(st.lists(branch, max_size=3))
    dense = (draw(st.integers(1, 40)), 1)
    return draw(st.permutations(list(dict.fromkeys([dense, *rest]))))


@settings(deadline=None, max_examples=150)
@given(
    branch_lists(), st.integers(1, 37), st.sampled_from([(1, 1), (2, 1), (4, 2), (5, 5), (6, 2), (9, 3)]),
    st.sampled_from([1, 6, 9]), st.integers(0, 2**32 - 1),
)  # fmt: skip
@example([(4, 1), (8, 2), (16, 4)], 37, (6, 2), 6, 0)
@example([(8, 8), (6, 3), (3, 1)], 1, (4, 2), 6, 0)
def test_it_is_one_softmax_with_multiplicities(
    branches: Branches, length: int, counts: tuple[int, int], values: int, seed: int
) -> None:
    inputs = qkv(*counts, length, values=values, seed=seed)
    y = dilated(branches, *counts, values=values)(*inputs)
    assert y.shape == (2, counts[0], length, values)
    assert max(gaps(y, one_softmax(*inputs, branches), inputs)) < 1e-10


@pytest.mark.parametrize("branches", [[(4, 1), (8, 2), (16, 4)], [(5, 1), (9, 3)], [(32, 1), (4, 4)]])
def test_it_is_what_the_paper_describes(branches: Branches) -> None:
    inputs = qkv(5, 5, 21)
    assert max(gaps(dilated(branches, 5, 5)(*inputs), branch_by_branch(*inputs, branches), inputs)) < 1e-10


@pytest.mark.parametrize("spoilt", [[(4, 1)], [(4, 1), (8, 4)], [(4, 1), (16, 2)], [(4, 1), (8, 2), (16, 2)]])
def test_the_twins_tell_other_branches_apart(spoilt: Branches) -> None:
    inputs = qkv(4, 2, 21)
    assert min(gaps(dilated([(4, 1), (8, 2)], 4, 2)(*inputs), one_softmax(*inputs, spoilt), inputs)) > 1e-2


def test_mixing_weights_are_differentiated() -> None:
    """Were they constants, as in the authors' code, the values would agree and the gradients would not."""
    branches = [(4, 1), (16, 2)]
    q, k, v = qkv(4, 4, 21)
    c = [multiplicity([branch], 4, 21) for branch in branches]
    e = (q @ k.mT / 6**0.5).exp()
    totals = [(x * e).sum(-1, keepdim=True) for x in c]
    parts = [(x * e) @ v / t.clamp_min(1e-300) for x, t in zip(c, totals, strict=True)]
    constant = sum(p * (t / sum(totals)).detach() for p, t in zip(parts, totals, strict=True))
    value, of_q, of_k, of_v = gaps(dilated(branches, 4, 4)(q, k, v), constant, [q, k, v])
    assert max(value, of_v) < 1e-10
    assert min(of_q, of_k) > 1e-2


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("segment", [32, 1000])
def test_one_segment_over_everything_is_plain_attention(length: int, segment: int) -> None:
    inputs = qkv(4, 2, length)
    assert max(gaps(dilated([(segment, 1)], 4, 2)(*inputs), SDPA(heads(4, 2))(*inputs), inputs)) < 1e-12


@pytest.mark.parametrize("scale", [30.0, 300.0])
def test_huge_scores_stay_finite(scale: float) -> None:
    branches = [(4, 1), (8, 2), (16, 4)]
    exact = [x.detach() for x in qkv(4, 2, 23, scale=scale)]
    q, k, v = [x.float().requires_grad_() for x in exact]
    y = dilated(branches, 4, 2)(q, k, v)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))
    s = exact[0] @ exact[1].repeat_interleave(2, 1).mT / 6**0.5 + multiplicity(branches, 4, 23).log()
    expected = s.softmax(-1) @ exact[2].repeat_interleave(2, 1)  # the twin, in logarithms: e^s overflows here
    assert (y - expected).abs().max() < 1e-4 * scale
    assert (q @ k.repeat_interleave(2, 1).mT).max() > 1000


def test_bfloat16_is_computed_in_float32_also_under_autocast() -> None:
    core, inputs = dilated([(16, 1), (32, 2), (64, 4)], 4, 2), [x.detach().bfloat16() for x in qkv(4, 2, 99, scale=3.0)]
    exact = core(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = core(*inputs)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= 2**-8 * exact.abs().max()  # the rounding of the result, nothing more


def test_without_memory_it_has_the_shape_of_its_values() -> None:
    """On the meta device, where sizes are planned and autocast is unknown."""
    core, (q, k, v) = dilated([(4, 1), (8, 2)], 4, 2, values=9), qkv(4, 2, 13, values=9)
    y = core(*(x.to("meta", dtype) for x, dtype in ((q, torch.float32), (k, torch.float32), (v, torch.bfloat16))))
    assert (y.device.type, y.shape, y.dtype) == ("meta", (2, 4, 13, 9), torch.bfloat16)


def test_each_sequence_is_alone() -> None:
    """Weights made stable with the batch's largest score, as in BlaGPT, would not pass."""
    core, (q, k, v) = dilated([(4, 1), (8, 2)], 4, 2), qkv(4, 2, 21)
    whole = core(q, k, v)
    assert all((core(q[i : i + 1], k[i : i + 1], v[i : i + 1]) - whole[i]).abs().max() < 1e-14 for i in range(2))


@pytest.mark.parametrize("branches", [[(4, 1), (8, 2), (16, 4)], [(6, 1), (16, 16), (12, 3)]])
def test_flops_count_the_pairs(branches: Branches) -> None:
    core = dilated(branches, 6, 2, dim=8, values=16)
    for length in (1, 7, 23, 48):
        assert core.flops_per_token(length) == int(2 * (8 + 16) * multiplicity(branches, 6, length).sum() / length)


def test_flops_of_full_segments_have_a_closed_form() -> None:
    """A token is kept by H / r heads, and each reads (w / r + 1) / 2 keys in the mean."""
    branches = [(4, 1), (8, 2), (16, 4)]
    pairs = sum(4 / r * (w / r + 1) / 2 for w, r in branches)
    assert dilated(branches, 4, 2, dim=8, values=16).flops_per_token(48) == 2 * (8 + 16) * pairs


def test_cost_grows_with_the_length() -> None:
    core = dilated([(64, 1), (128, 2), (256, 4)], 12, 4, dim=64)
    assert core.flops_per_token(1024) == core.flops_per_token(8192) < SDPA(heads(12, 4, 64)).flops_per_token(1024)


def largest(core: Dilated, length: int) -> int:
    """Numbers in the largest tensor that forward and backward save."""
    sizes = []

    def seen(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
        core(*qkv(4, 2, length))
    return max(sizes)


def test_no_tensor_is_quadratic_in_the_length() -> None:
    core = dilated([(8, 1), (16, 2), (32, 4)], 4, 2)
    assert largest(core, 512) == 4 * largest(core, 128)
    assert largest(core, 512) < 512 * 512


def test_it_compiles_to_one_graph_a_length() -> None:
    """As the house compiles: whole, and for one length at a time."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    core = dilated([(4, 1), (8, 2)], 4, 2)
    compiled = torch.compile(core, backend=graphs, fullgraph=True, dynamic=False)
    for length in (16, 13, 16):
        inputs = qkv(4, 2, length)
        assert max(gaps(compiled(*inputs), core(*inputs), inputs)) < 1e-12
    assert graphs.frame_count == 2


@pytest.mark.parametrize(
    ("segments", "dilations", "message"),
    [
        ([], [], "expected two lists of one length, 1 or more"),
        ([8], [], "expected two lists of one length"),
        ([8, 16], [1], r"layer 0: Dilated.segments=\[8, 16\], dilations=\[1\] \(expected two lists of one length"),
        ([0], [1], "expected numbers of 1 or more"),
        ([8, -8], [1, 2], "expected numbers of 1 or more"),
        ([8, 8], [1, 0], "expected numbers of 1 or more"),
        (
            [64, 512],
            [1, 6],
            r"segments: 512 does not divide by its dilation 6; nearby dilations that do: \[1, 2, 4, 8\]",
        ),
        ([8, 16], [2, 4], r"dilations=\[2, 4\] leave out positions of every head \(expected one to be 1\)"),
        ([8, 16, 8], [1, 2, 1], "branches 0 and 2 are the same at a context of 64 tokens"),
        ([64, 128], [1, 1], "branches 0 and 1 are the same at a context of 64 tokens"),
    ],
)
def test_a_mistake_is_told_when_building(segments: list[int], dilations: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dilated(heads(4, 2, context=64), segments, dilations)


def test_segments_may_differ_at_one_dilation() -> None:
    inputs = qkv(4, 2, 50)
    branches = [(4, 1), (16, 1)]
    assert max(gaps(dilated(branches, 4, 2)(*inputs), one_softmax(*inputs, branches), inputs)) < 1e-10
    assert math.lcm(*(r for _, r in branches)) == dilated(branches, 4, 2).period
