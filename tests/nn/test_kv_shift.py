"""KV-shifting against a causal depthwise convolution, at its neutral values, and where it stands."""

import pytest
import torch
from helpers import SITE, D, L, attention, batch, block, carry_of, check_variant, heads, qk_norm, shake, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import count
from blagpt_pl.testing import check_part


def projected(n: int, n_kv: int, length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, h, length, 8, dtype=dtype) for h in (n, n_kv, n_kv)]


def by_convolution(x: Tensor, now: Tensor, past: Tensor) -> Tensor:
    """The twin: a causal depthwise convolution of width 2 over the tokens, kernel [past, now]; x (B, G, T, K)."""
    channels = x.transpose(2, 3).flatten(1, 2)  # (B, G K, T)
    kernel = torch.stack((past, now), dim=-1).repeat_interleave(x.shape[3], 0)[:, None]  # (G K, 1, 2)
    y = F.conv1d(F.pad(channels, (1, 0)), kernel, groups=len(kernel))
    return y.unflatten(1, x.shape[1::2]).transpose(2, 3)


def shifted(neutral: bool = False, edits: list | None = None) -> BlaGPT:
    """The tiny baseline with KV-shifting in front, moved off its start; at its neutral values if asked."""
    model = tiny(block=block(attention=attention(edits=edits or [KVShift, qk_norm, RoPE])))
    shake(model)
    if neutral:
        for edit in (m for m in model.modules() if isinstance(m, KVShift)):
            for p, value in ((edit.k_now, 1.0), (edit.v_now, 1.0), (edit.k_past, 0.0), (edit.v_past, 0.0)):
                torch.nn.init.constant_(p, value)
    return model.eval()


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.integers(1, 40), st.integers(0, 2**31))
def test_it_is_a_convolution_of_width_two(counts: tuple[int, int], length: int, seed: int) -> None:
    torch.manual_seed(seed)
    edit = shake(KVShift(heads(*counts, 8)).double(), std=0.5)
    q, k, v = projected(*counts, length)
    new_q, new_k, new_v = edit(q, k, v, carry_of(v))
    assert new_q is q
    assert (new_k - by_convolution(k, edit.k_now, edit.k_past)).abs().max() < 1e-10
    assert (new_v - by_convolution(v, edit.v_now, edit.v_past)).abs().max() < 1e-10


def test_the_twin_can_tell() -> None:
    """Swapped taps, or another head's numbers, are far off."""
    edit = KVShift(heads(4, 2, 8)).double()
    q, k, v = projected(4, 2, 13)
    _, new_k, _ = edit(q, k, v, carry_of(v))
    assert (new_k - by_convolution(k, edit.k_past, edit.k_now)).abs().max() > 0.01
    assert (new_k - by_convolution(k, edit.k_now.flip(0), edit.k_past.flip(0))).abs().max() > 0.01


def test_nothing_stands_before_the_first_token() -> None:
    edit = KVShift(heads(4, 2, 8))
    q, k, v = projected(4, 2, 1, torch.float32)
    _, new_k, new_v = edit(q, k, v, carry_of(v))
    assert torch.equal(new_k, edit.k_now[:, None, None] * k)
    assert torch.equal(new_v, edit.v_now[:, None, None] * v)


def test_inputs_are_left_alone_and_types_kept() -> None:
    edit = KVShift(heads(4, 2, 8))
    for dtype in (torch.bfloat16, torch.float32):  # float32 parameters on bfloat16 heads are what autocast gives
        qkv = projected(4, 2, 13, dtype)
        before = [x.clone() for x in qkv]
        edited = edit(*qkv, carry_of(qkv[2]))
        assert [x.dtype for x in edited] == [dtype] * 3
        assert all(map(torch.equal, qkv, before))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the parameters: under autocast, and all 16 bit
def test_bf16_heads_are_mixed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    edit = shake(KVShift(heads(4, 2, 8)), std=0.5).to(dtype)
    q, k, v = projected(4, 2, 99, torch.bfloat16)
    _, *mixtures = edit(q, k, v, carry_of(v))
    numbers = [(edit.k_now, edit.k_past), (edit.v_now, edit.v_past)]
    for y, x, (now, past) in zip(mixtures, (k, v), numbers, strict=True):
        before = F.pad(x.float()[:, :, :-1], (0, 0, 1, 0))
        a, b = now.float()[:, None, None] * x.float(), past.float()[:, None, None] * before
        assert torch.equal(y, (a + b).bfloat16())
        assert not torch.equal(y, a.bfloat16() + b.bfloat16())  # as it would be in bfloat16


def test_the_start_is_a_mean_of_the_two() -> None:
    edit = KVShift(heads(512, 256, 8))
    for now, past in ((edit.k_now, edit.k_past), (edit.v_now, edit.v_past)):
        assert torch.equal(past, 1 - now)
        assert 0 <= now.min() < 0.05
        assert 0.95 < now.max() < 1
        assert abs(now.mean() - 0.5) < 5 * (1 / 12 / 256) ** 0.5
        assert past.is_leaf
    assert not torch.equal(edit.k_now, edit.v_now)


def test_the_init_of_a_model_leaves_the_start_alone() -> None:
    model = tiny(block=block(attention=attention(edits=[KVShift, qk_norm, RoPE])))
    edits = [m for m in model.modules() if isinstance(m, KVShift)]
    assert len(edits) == L
    assert all(torch.equal(edit.k_past, 1 - edit.k_now) and edit.k_now.any() for edit in edits)


def test_at_its_neutral_values_it_is_the_baseline_bit_for_bit() -> None:
    model, baseline = shifted(neutral=True), tiny().eval()
    baseline.load_state_dict(shared(model), strict=True)
    tokens, targets = batch(model)
    assert torch.equal(model(tokens), baseline(tokens))
    assert torch.equal(model.objective(tokens, targets)[0], baseline.objective(tokens, targets)[0])
    moved = shifted()
    moved.load_state_dict({**moved.state_dict(), **baseline_names(model)})
    assert (moved(tokens) - baseline(tokens)).abs().max() > 1e-3


def shared(model: BlaGPT) -> dict[str, Tensor]:
    """The state that the baseline has too, under its names there: its edits are counted without the first."""
    return {name.replace("edits.1.", "edits.0."): p for name, p in baseline_names(model).items()}


def baseline_names(model: BlaGPT) -> dict[str, Tensor]:
    return {name: p for name, p in model.state_dict().items() if "edits.0." not in name}


def test_it_adds_four_numbers_a_key_value_head() -> None:
    model = shifted()
    assert count(model.parameters()) == count(tiny().parameters()) + 4 * 2 * L
    roles = {role for name, role in model.parameter_roles().items() if "edits.0." in name}
    assert roles == {"vector"}


@pytest.mark.parametrize("edits", [[RoPE, KVShift], [qk_norm, KVShift, RoPE], [qk_norm, RoPE, KVShift]])
def test_where_it_stands_matters(edits: list) -> None:
    """KVShift does not commute with its neighbours; nothing refuses the other orders."""
    proper = [KVShift, *(e for e in edits if e is not KVShift)]
    x = torch.randn(2, 13, D)
    outputs = []
    for order in (proper, edits):
        torch.manual_seed(0)
        part = attention(edits=order)(SITE)
        outputs.append(part(x, carry_of(x)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


def test_before_rope_the_previous_key_takes_the_position_of_the_mixture() -> None:
    """Only the previous key counts: before RoPE the score of query t with position s is that of k_{s-1} turned to s."""
    q, k, v = projected(2, 2, 13)
    shift, rope = KVShift(heads(2, 2, 8)).double(), RoPE(heads(2, 2, 8))
    for p, value in ((shift.k_now, 0.0), (shift.k_past, 1.0)):
        torch.nn.init.constant_(p, value)
    _, first, _ = rope(*shift(q, k, v, carry_of(v)), carry_of(v))
    _, late, _ = shift(*rope(q, k, v, carry_of(v)), carry_of(v))
    _, expected, _ = rope(q, torch.cat((torch.zeros_like(k[:, :, :1]), k[:, :, :-1]), 2), v, carry_of(v))
    assert torch.equal(first, expected)
    assert (late - expected).abs().max() > 0.1


def test_the_promises_of_a_model_hold() -> None:
    check_variant(tiny(block=block(attention=attention(edits=[KVShift, qk_norm, RoPE]))))


class ShiftsTheOtherWay(KVShift):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: object) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(x.flip(2) for x in super().forward(q.flip(2), k.flip(2), v.flip(2), carry))


def test_a_shift_the_other_way_is_told() -> None:
    with pytest.raises(AssertionError, match="looks into the future"):
        check_part(ShiftsTheOtherWay)


def test_it_compiles_without_a_break() -> None:
    part = shake(attention(edits=[KVShift, qk_norm, RoPE])(SITE))
    x = torch.randn(2, 13, D)
    torch._dynamo.reset()
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True, dynamic=False)(x, carry_of(x))
    torch._dynamo.reset()
    assert (compiled - part(x, carry_of(x))).abs().max() < 1e-6
