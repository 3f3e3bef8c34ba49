"""Mamba-2's mixer: its formula, Hugging Face's, the pieces of a sequence, its start, its roles and what it refuses."""

from dataclasses import replace
from functools import partial

import naive_ssd
import pytest
import torch
from helpers import SITE, carry_of, shake
from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.recurrent.mamba2 import GatedRMSNorm, Mamba2
from blagpt_pl.nn.roles import roles_of, splits_of
from blagpt_pl.nn.states import States

VARIANTS = {
    "plain": {},
    "groups": {"n_groups": 4},
    "norm before gate": {"norm_before_gate": True, "n_groups": 2},
    "slowest step, large eps": {"dt_min": 0.7, "norm_eps": 0.1},
    "conv 2, expand 3": {"conv": 2, "expand": 3},
}
small = partial(Mamba2, SITE, d_state=6, head_dim=8, chunk=8)


def run(part: Mamba2, x: Tensor, states: States | None = None) -> Tensor:
    carry = carry_of(x)
    return part(x, Carry(carry.tokens, x, states=states))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_is_its_formula(changes: dict) -> None:
    part, x = shake(small(**changes), 0.3).double(), torch.randn(2, 21, 32, dtype=torch.float64, requires_grad=True)
    options = {"norm_before_gate": False, "dt_min": 0.0, "norm_eps": 1e-5, **changes}
    naive = naive_ssd.mamba2(x, part, options["norm_before_gate"], options["dt_min"], options["norm_eps"])
    weights, given = torch.randn(2, 21, 32, dtype=torch.float64), [x, *part.parameters()]
    y = run(part, x)
    assert y.std() > 0.1 and (y - naive).abs().max() < 1e-10
    found, expected = (torch.autograd.grad((out * weights).sum(), given) for out in (y, naive))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-10 * max(1.0, other.abs().max().item())


@torch.no_grad()
def theirs(part: Mamba2, **changes: object) -> nn.Module:
    """Hugging Face's mixer with our weights."""
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    sizes = {"hidden_size": 32, "state_size": 6, "head_dim": 8, "num_heads": part.heads, "n_groups": part.groups}
    config = mamba2.Mamba2Config(num_hidden_layers=1, chunk_size=5, vocab_size=61, **sizes, **changes)
    other = mamba2.Mamba2Mixer(config, 0).eval()
    other.in_proj.weight.copy_(part.proj.weight)
    other.conv1d.weight.copy_(part.conv.weight[:, None])
    other.conv1d.bias.copy_(part.conv.bias)
    for name in ("A_log", "dt_bias", "D"):
        getattr(other, name).copy_(getattr(part, name))
    other.norm.weight.copy_(part.norm.weight)
    other.out_proj.weight.copy_(part.out.weight)
    return other


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, {}),
        ({"n_groups": 4}, {}),
        ({"expand": 3, "conv": 3}, {"expand": 3, "conv_kernel": 3}),
        ({"dt_min": 0.5, "norm_eps": 1e-2}, {"time_step_limit": (0.5, float("inf")), "layer_norm_epsilon": 1e-2}),
    ],
)
@torch.no_grad()
def test_it_is_hugging_faces(changes: dict, config: dict) -> None:
    part, x = shake(small(**changes), 0.3), torch.randn(2, 23, 32)
    y = run(part, x)
    assert y.std() > 0.1 and (y - theirs(part, **config)(x)).abs().max() < 1e-5
    part.conv.bias[3] += 0.1
    assert (run(part, x) - y).abs().max() > 1e-4


@pytest.mark.parametrize("cuts", [[1] * 21, [8, 8, 5], [20, 1], [1, 20], [3, 5, 13]])
@pytest.mark.parametrize("changes", [{}, {"n_groups": 2, "norm_before_gate": True, "conv": 1}])
@torch.no_grad()
def test_pieces_are_the_whole(changes: dict, cuts: list[int]) -> None:
    part, x, states, found = shake(small(**changes), 0.3).double(), torch.randn(2, 21, 32).double(), States(), []
    for piece in x.split(cuts, 1):
        found.append(run(part, piece, states))
        assert not states.grows
        states = states.after(piece.shape[1])
    assert (torch.cat(found, 1) - run(part, x)).abs().max() < 1e-12


@torch.no_grad()
def test_the_state_has_one_size_and_is_wide() -> None:
    part, states = small().bfloat16(), States()
    for length in (1, 5, 13):
        assert run(part, torch.randn(2, length, 32).bfloat16(), states).dtype == torch.bfloat16
        ((recent, state),) = states._left
        assert recent.shape == (2, 3, 64 + 2 * 6) and state.shape == (2, 8, 8, 6)
        assert recent.dtype == state.dtype == torch.float32
        states = states.after(length)


def test_autocast_rounds_the_projections_alone() -> None:
    part, x = shake(small(), 0.3), torch.randn(2, 21, 32)
    exact = run(part, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(part, x)
    y.sum().backward()
    assert y.isfinite().all() and (y - exact).abs().max() < 3e-2 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in part.parameters())


def test_what_it_starts_with() -> None:
    """Log-uniform steps and uniform rates, which the start of the model leaves alone."""
    torch.manual_seed(0)
    part = Mamba2(replace(SITE, d_model=8), d_state=1, head_dim=1, expand=512)  # 4096 heads
    before = {name: p.clone() for name, p in part.named_parameters()}
    GPT2Init(zero_outputs=True)(part, SITE)
    for name, p in part.named_parameters():
        assert torch.equal(p, before[name]) == (name not in ("proj.weight", "out.weight")), name
    step, rate = nn.functional.softplus(part.dt_bias).detach(), part.A_log.exp().detach()
    assert 0.99e-3 < step.min() < 1.1e-3 and 0.095 < step.max() < 0.101
    assert abs(step.log().mean() - torch.tensor(0.01).log()) < 0.1  # the middle of both ends, on a log scale
    assert rate.min() < 1.1 and 15.9 < rate.max() < 16.001 and abs(rate.mean() - 8.5) < 0.3
    assert (part.D == 1).all() and (part.norm.weight == 1).all()


def test_roles_splits_and_size() -> None:
    part = small(n_groups=2)
    roles = roles_of(part, nn.Identity())
    assert {name for name, role in roles.items() if role == "recurrence"} == {
        "A_log", "dt_bias", "D", "conv.weight", "conv.bias"
    }  # fmt: skip
    assert roles["proj.weight"] == roles["out.weight"] == "matrix" and roles["norm.weight"] == "vector"
    assert splits_of(part) == {"proj.weight": (64, 64, 12, 12, 8)}
    d, inner, shared, heads, conv = 32, 64, 12, 8, 4
    expected = d * (2 * inner + 2 * shared + heads) + (conv + 1) * (inner + 2 * shared) + 3 * heads + inner + inner * d
    assert count(part.parameters()) == expected


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(ValueError, match=r"layer 0: Mamba2.head_dim: 24 does not go into .* 64 .*\[4, 8, 16, 32\]"):
        Mamba2(SITE, head_dim=24)
    with pytest.raises(ValueError, match=r"n_groups: 3 groups of 4 heads .*choose of \[1, 2, 4\]"):
        Mamba2(SITE, head_dim=16, n_groups=3)
    with pytest.raises(ValueError, match=r"Mamba2.dt_min: -0.1"):
        Mamba2(SITE, head_dim=16, dt_min=-0.1)
    for name in ("d_state", "head_dim", "expand", "n_groups", "conv", "chunk"):
        with pytest.raises(ValueError, match=rf"layer 0: Mamba2.{name}: 0 \(expected 1 or more"):
            Mamba2(SITE, **{"head_dim": 16, name: 0})


def test_how_it_is_computed_is_told() -> None:
    cpu = torch.device("cpu")
    assert small().kernel(cpu, torch.float32, 1000) == "chunks of 8"
    assert small().kernel(cpu, torch.float32, 5) == "chunks of 5"


def test_the_norm_gates_in_float32() -> None:
    norm = GatedRMSNorm(16, 2, True, 1e-5)
    x, gate = torch.randn(3, 16), torch.randn(3, 16).bfloat16()
    assert torch.equal(norm(x, gate), norm(x, gate.float()))
