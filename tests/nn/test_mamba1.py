"""Mamba-1: equal to its definition, to transformers' Mamba and FalconMamba and to mambapy; its size, start and pieces."""

import math
from functools import partial

import pytest
import torch
from helpers import SITE, D, V, carry_of, shake, tiny
from naive_selective_scan import scan
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.block import SoloBlock
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.recurrent import mamba1
from blagpt_pl.nn.recurrent.mamba1 import Mamba1, SelectiveSSM
from blagpt_pl.nn.roles import roles_of
from blagpt_pl.nn.states import States

N, R, K = 6, 3, 4  # state, rank of the step sizes, width of the convolution
mixer = partial(Mamba1, d_state=N, dt_rank=R)
FORMS = {"plain": mixer, "normed": partial(mixer, norm=RMSNorm)}
LENGTHS = [1, 5, 33, 64]


def naive(part: SelectiveSSM, u: Tensor, z: Tensor) -> Tensor:
    """Its formula, (B, T, d) -> (B, T, d)."""
    width = part.conv.weight.shape[1]
    before = torch.cat((torch.zeros_like(u[:, :1]).expand(-1, width - 1, -1), u), dim=1)
    taps = [part.conv.weight[:, i] * before[:, i : i + u.shape[1]] for i in range(width)]
    u = F.silu(sum(taps) + part.conv.bias)
    dt, b, c = (u @ part.proj.weight.T).split([R, N, N], dim=-1)
    if part.norms is not None:
        dt, b, c = (
            t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
            for t, norm in zip((dt, b, c), part.norms, strict=True)
        )
    dt = torch.log1p(torch.exp(dt @ part.dt_weight.T + part.dt_bias))
    y, _ = scan(u, dt, -part.A_log.exp(), b, c)
    return (y + part.D * u) * z * torch.sigmoid(z)


def mixed(part: Mamba1, x: Tensor) -> Tensor:
    u, z = (x @ part.proj.weight.T).chunk(2, dim=-1)
    return naive(part.ssm, u, z) @ part.out.weight.T


def largest_gap(part: Mamba1, length: int) -> float:
    """Between the mixer and its definition, of the output and every gradient, in float64."""
    part = shake(part, 0.3).double()
    x = torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    x, found = x.requires_grad_(), []
    for y in (part(x, carry_of(x)), mixed(part, x)):
        found.append([y, *torch.autograd.grad((y * torch.arange(1.0, D + 1)).sum(), [x, *part.parameters()])])
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_its_definition(form: str, length: int) -> None:
    assert largest_gap(FORMS[form](SITE), length) < 1e-10


def test_a_bias_that_is_added_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scanned = mamba1.SelectiveScan.forward

    def twice(self: nn.Module, u: Tensor, dt: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return scanned(self, u, F.softplus(dt), *rest)

    monkeypatch.setattr(mamba1.SelectiveScan, "forward", twice)
    assert largest_gap(mixer(SITE), 5) > 1e-3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("edges", [[1], [2, 3, 20], list(range(1, 37))])
def test_pieces_are_the_whole(form: str, edges: list[int]) -> None:
    part = shake(FORMS[form](SITE), 0.3).double()
    x = torch.randn(2, 37, D, dtype=torch.float64)
    whole, found, states = part(x, carry_of(x)), [], States()
    for piece in x.tensor_split(edges, dim=1):
        tokens = torch.zeros(piece.shape[:2], dtype=torch.int64)
        found.append(part(piece, Carry(tokens, piece, states=states)))
        states = states.after(piece.shape[1])
    assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-12
    assert not states.grows


# ---------------------------------------------------------------------- others' implementations


def model(form: str) -> BlaGPT:
    """A language model of Mamba's blocks."""
    block = partial(SoloBlock, norm=RMSNorm, part=FORMS[form])
    return shake(tiny(block=block, init=GPT2Init(zero_outputs=False)), 0.1).eval()


@torch.no_grad()
def copy_ssm(mine: Mamba1, theirs: nn.Module) -> None:
    """Write our mixer's weights into one with the authors' names."""
    theirs.in_proj.weight.copy_(mine.proj.weight)
    theirs.conv1d.weight.copy_(mine.ssm.conv.weight[:, None])
    theirs.conv1d.bias.copy_(mine.ssm.conv.bias)
    theirs.x_proj.weight.copy_(mine.ssm.proj.weight)
    theirs.dt_proj.weight.copy_(mine.ssm.dt_weight)
    theirs.dt_proj.bias.copy_(mine.ssm.dt_bias)
    theirs.A_log.copy_(mine.ssm.A_log)
    theirs.D.copy_(mine.ssm.D)
    theirs.out_proj.weight.copy_(mine.out.weight)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_is_that_of_transformers(form: str) -> None:
    config, language_model = {
        "plain": (MambaConfig, MambaForCausalLM), "normed": (FalconMambaConfig, FalconMambaForCausalLM),
    }[form]  # fmt: skip
    mine = model(form)
    theirs = language_model(
        config(
            vocab_size=V, hidden_size=D, state_size=N, num_hidden_layers=2, time_step_rank=R, conv_kernel=K,
            layer_norm_epsilon=1e-6, tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    ).eval()  # fmt: skip
    theirs.backbone.embeddings.weight.copy_(mine.embedding.weight)
    theirs.backbone.norm_f.weight.copy_(mine.norm.weight)
    for block, layer in zip(mine.blocks, theirs.backbone.layers, strict=True):
        layer.norm.weight.copy_(block.branch.norm.weight)
        copy_ssm(block.branch.part, layer.mixer)
        if block.branch.part.ssm.norms is not None:  # theirs have no gains
            for norm in block.branch.part.ssm.norms:
                norm.weight.fill_(1.0)
    tokens = torch.randint(V, (2, 29))
    gap = (mine(tokens) - theirs(tokens).logits).abs().max()
    assert gap < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_it_is_that_of_mambapy(form: str) -> None:
    mambapy = pytest.importorskip("mambapy.mamba", reason="pip install --no-deps mambapy==1.2.0")
    part = shake(FORMS[form](SITE), 0.3)
    config = mambapy.MambaConfig(
        D, 1, dt_rank=R, d_state=N, d_conv=K, rms_norm_eps=1e-6, inner_layernorms=form == "normed"
    )
    theirs = mambapy.MambaBlock(config)
    copy_ssm(part, theirs)
    if part.ssm.norms is not None:
        for norm, layer in zip(
            part.ssm.norms, (theirs.dt_layernorm, theirs.B_layernorm, theirs.C_layernorm), strict=True
        ):
            layer.weight.copy_(norm.weight)
    x = torch.randn(2, 29, D)
    y = theirs(x)
    assert (part(x, carry_of(x)) - y).abs().max() < 2e-5 * y.abs().max()


# ---------------------------------------------------------------------- size, start, roles, precision


@pytest.mark.parametrize("form", FORMS)
def test_parameters_and_flops(form: str) -> None:
    d = 2 * D
    made = model(form)
    formula = 2 * D * d + (K + 1) * d + d * (R + 2 * N) + R * d + d + d * N + d + d * D
    assert count(made.blocks[0].branch.part.parameters()) == formula + (R + 2 * N) * (form == "normed")
    flops = count_flops(made, 32)
    assert not flops.uncounted
    assert flops.forward_per_token == 2 * 2 * (3 * D * d + d * (2 * R + 2 * N)) + 2 * D * V
    assert flops.backward_per_token == 2 * flops.forward_per_token


def test_the_rank_follows_the_width() -> None:
    assert Mamba1(SITE).ssm.dt_weight.shape == (2 * D, 2)
    with pytest.raises(ValueError, match=r"layer 0: Mamba1\.dt_rank: 0"):
        Mamba1(SITE, dt_rank=0)
    with pytest.raises(ValueError, match=r"layer 0: Mamba1\.d_state: 0"):
        Mamba1(SITE, d_state=0)


def test_what_drives_the_recurrence_starts_as_the_authors_has_it_and_keeps_its_start() -> None:
    ssm = tiny(block=partial(SoloBlock, norm=RMSNorm, part=mixer)).blocks[0].branch.part.ssm
    assert torch.allclose(ssm.A_log.exp(), torch.arange(1.0, N + 1).expand(2 * D, N))
    assert (ssm.D == 1).all()
    steps = F.softplus(ssm.dt_bias)
    assert steps.min() > 0.99e-3 and steps.max() < 0.101
    assert abs(steps.log().mean() - math.log(1e-2)) < 0.5
    assert R**-0.5 * 0.8 < ssm.dt_weight.abs().max() <= R**-0.5
    assert ssm.conv.weight.abs().max() > 0.4  # not N(0, 0.02²)


def test_roles() -> None:
    roles = roles_of(Mamba1(SITE), nn.Module())
    matrices = {"proj.weight", "ssm.proj.weight", "out.weight"}
    assert {name for name, role in roles.items() if role == "matrix"} == matrices
    assert {role for name, role in roles.items() if name not in matrices} == {"recurrence"}


def test_half_precision_stays_close() -> None:
    part, x = shake(mixer(SITE), 0.1), torch.randn(2, 40, D)
    exact = part(x, carry_of(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = part(x, carry_of(x))
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert (y - exact).abs().max() < 3e-2 * exact.abs().max()


def test_it_is_one_graph() -> None:
    torch._dynamo.reset()
    part, x = shake(mixer(SITE)), torch.randn(1, 9, D)
    found = []
    for run in (part, torch.compile(part, backend="aot_eager", fullgraph=True)):
        y = run(x, carry_of(x))
        found.append([y, *torch.autograd.grad(y.square().sum(), list(part.parameters()))])
    torch._dynamo.reset()
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 2e-6


def test_it_says_how_it_is_computed() -> None:
    part = mixer(SITE)
    assert part.kernel(torch.device("cuda"), torch.float32, 1024) == "chunks of 32"
    assert part.kernel(torch.device("cuda"), torch.float32, 8) == "chunks of 8"
    assert part.kernel(torch.device("cpu"), torch.float32, 8) == "one position after the other"


def test_autocast_does_not_reach_the_step_sizes() -> None:
    part, seen = shake(Mamba1(SITE), 0.3).ssm, []
    u, z = torch.randn(2, 2, 19, 2 * SITE.d_model).bfloat16().unbind(0)
    part.scan.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    part.proj.register_forward_hook(lambda module, given, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        part(u, z)
    out, (_, dt) = seen
    exact = F.softplus(out[..., : part.rows[0]].float() @ part.dt_weight.T + part.dt_bias)
    assert dt.dtype == torch.float32
    assert (dt - exact).abs().max() < 1e-5 * exact.abs().max()
