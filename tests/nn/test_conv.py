"""Short convolutions: their definition, the pieces of a sequence, torch's own, and LFM2's mixer."""

from functools import partial

import naive_ssd
import pytest
import torch
from helpers import SITE, carry_of, shake
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.recurrent.conv import GatedShortConv, ShortConv
from blagpt_pl.nn.roles import roles_of, splits_of
from blagpt_pl.nn.states import States

B, C = 2, 6


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 11])
def test_it_is_its_formula(length: int, width: int, bias: bool) -> None:
    conv = ShortConv(C, width, bias).double()
    parameters = list(conv.parameters())
    for past in (None, inputs(B, width - 1, C)):
        x, weights = inputs(B, length, C), torch.randn(B, length, C, dtype=torch.float64)
        given = [x, *parameters] + ([] if past is None else [past])
        y, last = conv(x, past)
        expected = naive_ssd.conv(x, conv.weight, conv.bias, past)
        assert (y - expected).abs().max() < 1e-12
        found, wanted = (
            torch.autograd.grad((weights * out).sum(), given, materialize_grads=True) for out in (y, expected)
        )
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, wanted, strict=True) if a.numel())
        before = torch.zeros(B, width - 1, C) if past is None else past
        assert torch.equal(last, torch.cat([before, x], 1)[:, length:])


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_torchs_grouped_convolution(bias: bool) -> None:
    conv, x = ShortConv(C, 4, bias), torch.randn(B, 19, C)
    theirs = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight[:, None], conv.bias, groups=C).mT
    assert (conv(x)[0] - theirs).abs().max() < 1e-6


def test_it_starts_as_torchs_does() -> None:
    torch.manual_seed(0)
    conv = ShortConv(4000, 4, bias=True)
    reference = torch.nn.Conv1d(4000, 4000, 4, groups=4000)
    for mine, theirs in ((conv.weight, reference.weight), (conv.bias, reference.bias)):
        assert mine.abs().max() <= 0.5 and theirs.abs().max() <= 0.5
        assert abs(mine.std() - theirs.std()) < 0.01


@pytest.mark.parametrize("cuts", [[1] * 11, [1, 10], [2, 1, 8], [7, 4]])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_pieces_are_the_whole(width: int, cuts: list[int]) -> None:
    conv, x, past, found = ShortConv(C, width, bias=True), torch.randn(B, 11, C), None, []
    for piece in x.split(cuts, 1):
        y, past = conv(piece, past)
        found.append(y)
    assert torch.equal(torch.cat(found, 1), conv(x)[0])


def test_no_future() -> None:
    conv, x = ShortConv(C, 4, bias=True).double(), inputs(1, 9, C)
    for t in range(9):
        (reach,) = torch.autograd.grad(conv(x)[0][0, t].sum(), x)
        assert reach[0].any(1).nonzero().flatten().tolist() == list(range(max(0, t - 3), t + 1))


def test_in_bfloat16_it_is_computed_in_float32() -> None:
    conv, x = ShortConv(C, 4, bias=True), torch.randn(B, 19, C).bfloat16()
    y, last = conv(x)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert torch.equal(y, conv(x.float())[0].bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(x)[0], y)


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(ValueError, match=r"ShortConv.width: 0 \(expected 1 or more"):
        ShortConv(C, 0, bias=True)
    with pytest.raises(ValueError, match=r"layer 0: GatedShortConv.width: 0"):
        GatedShortConv(SITE, width=0)


def test_roles_and_size_of_the_gated_one() -> None:
    part = GatedShortConv(SITE, bias=True)
    roles = roles_of(part, torch.nn.Identity())
    assert roles["conv.weight"] == roles["conv.bias"] == "recurrence"
    assert roles["proj.weight"] == roles["out.weight"] == "matrix" and roles["out.bias"] == "vector"
    assert splits_of(part) == {"proj.weight": (32, 32, 32)}
    assert count(part.parameters()) == 4 * 32**2 + 3 * 32 + 5 * 32
    assert count(GatedShortConv(SITE, width=4).parameters()) == 4 * 32**2 + 4 * 32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [3, 4])
@torch.no_grad()
def test_the_gated_one_is_lfm2s(width: int, bias: bool) -> None:
    lfm2 = pytest.importorskip("transformers.models.lfm2.modeling_lfm2")
    config = lfm2.Lfm2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        conv_L_cache=width,
        conv_bias=bias,
        layer_types=["conv"],
    )
    theirs, mine = lfm2.Lfm2ShortConv(config, 0), shake(GatedShortConv(SITE, width, bias), 0.2)
    for one, other in ((theirs.in_proj, mine.proj), (theirs.conv, mine.conv), (theirs.out_proj, mine.out)):
        one.weight.copy_(other.weight.view_as(one.weight))
        if bias:
            one.bias.copy_(other.bias)
    x = torch.randn(2, 13, 32)
    y = mine(x, carry_of(x))
    assert y.std() > 0.1 and (y - theirs(x)).abs().max() < 1e-6


@pytest.mark.parametrize("cuts", [[1] * 9, [5, 4], [1, 8]])
def test_the_gated_one_continues(cuts: list[int]) -> None:
    part, x, states, found = shake(GatedShortConv(SITE, bias=True), 0.2), torch.randn(2, 9, 32), States(), []
    for piece in x.split(cuts, 1):
        carry = carry_of(piece)
        found.append(part(piece, Carry(carry.tokens, piece, states=states)))
        assert not states.grows
        states = states.after(piece.shape[1])
    assert (torch.cat(found, 1) - part(x, carry_of(x))).abs().max() < 1e-6


def test_the_gated_one_is_one_graph() -> None:
    part, x = GatedShortConv(SITE), torch.randn(2, 9, 32)
    torch._dynamo.reset()
    compiled = torch.compile(partial(part, carry=carry_of(x)), backend="aot_eager", fullgraph=True, dynamic=False)
    assert torch.equal(compiled(x), part(x, carry_of(x)))
    torch._dynamo.reset()
