"""Attention against a twin that a reader can believe, in float64."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import SITE, D, attention, block, carry_of, heads, shake
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.nn.activation import GELU, ReLU2, SiLU
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.edit_qk_norm import QKNorm
from blagpt_pl.nn.attention.edit_rope import RoPE, angles, rotate
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.mlp import MLP, GatedMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The twin of SDPA: for each query its keys, one by one; q (B, H, T, K), k and v (B, G, T, K)."""
    out = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys, values = k[b, h // group, : t + 1], v[b, h // group, : t + 1]  # (t + 1, K)
                weights = (keys @ q[b, h, t] / q.shape[3] ** 0.5).exp()
                out[b, h, t] = (weights / weights.sum()) @ values
    return out


def whole_attention(part: Attention, x: Tensor) -> Tensor:
    """The twin of the pipeline: QK-norm and RoPE as in the baseline, written out, with one matrix for each head."""
    h = part.heads
    matrices = part.qkv.weight.split(h.dim)  # H + 2 G of (K, D)
    length = x.shape[1]
    frequency = 10000.0 ** (-torch.arange(0, h.dim, 2, dtype=x.dtype) / h.dim)
    angle = torch.arange(length, dtype=x.dtype)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)  # (T, K/2)

    def turned(y: Tensor, gain: Tensor) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        z = torch.complex(y[..., : h.dim // 2], y[..., h.dim // 2 :]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    outputs = []
    for i in range(h.n):
        j = i // (h.n // h.n_kv)
        q = turned(x @ matrices[i].T, part.edits[0].q.weight)
        k = turned(x @ matrices[h.n + j].T, part.edits[0].k.weight)
        v = x @ matrices[h.n + h.n_kv + j].T
        scores = q @ k.transpose(-1, -2) / h.dim**0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=-1) @ part.out.weight.T


@pytest.mark.parametrize(("n", "n_kv"), [(4, 4), (4, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_sdpa_equals_its_twin(n: int, n_kv: int, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (torch.randn(2, count, 13, 8, dtype=dtype) for count in (n, n_kv, n_kv))
    gap = SDPA(heads(n, n_kv, 8))(q, k, v) - softmax_attention(q, k, v)
    assert gap.abs().max() < tolerance


def test_sdpa_drops_weights_in_training_only() -> None:
    core = SDPA(heads(4, 2, 8), dropout=0.5)
    q, k, v = (torch.randn(2, count, 13, 8) for count in (4, 2, 2))
    assert torch.equal(core.eval()(q, k, v), SDPA(heads(4, 2, 8))(q, k, v))
    core.train()
    assert not torch.equal(core(q, k, v), core(q, k, v))
    mean = torch.stack([core(q, k, v) for _ in range(2000)]).mean(0)
    assert (mean - core.eval()(q, k, v)).abs().max() < 0.2  # dropped, and the rest scaled up


@pytest.mark.parametrize(("n_kv", "head_dim"), [(4, None), (2, None), (1, 6)])
def test_the_pipeline_equals_its_twin(n_kv: int, head_dim: int | None) -> None:
    part = shake(attention(n_kv_heads=n_kv, head_dim=head_dim)(SITE).double())
    x = torch.randn(2, 13, D, dtype=torch.float64)
    gap = (part(x, carry_of(x)) - whole_attention(part, x)).abs().max()
    assert gap < 1e-6  # our angles are float32
    assert part(x, carry_of(x)).abs().max() > 0.01


@pytest.mark.parametrize("n_kv", [1, 2])
def test_grouped_heads_equal_plain_heads_with_repeated_rows(n_kv: int) -> None:
    part, plain = attention(n_kv_heads=n_kv, qkv_bias=True)(SITE), attention(n_kv_heads=4, qkv_bias=True)(SITE)
    rows = [4 * 8, n_kv * 8, n_kv * 8]

    def repeated(fused: Tensor) -> Tensor:
        q, k, v = fused.split(rows)
        k, v = (y.unflatten(0, (n_kv, 8)).repeat_interleave(4 // n_kv, 0).flatten(0, 1) for y in (k, v))
        return torch.cat([q, k, v])

    with torch.no_grad():
        plain.qkv.weight.copy_(repeated(part.qkv.weight))
        plain.qkv.bias.copy_(repeated(part.qkv.bias))
        plain.out.load_state_dict(part.out.state_dict())
    x = torch.randn(2, 13, D)
    gap = (part(x, carry_of(x)) - plain(x, carry_of(x))).abs().max()
    assert gap < 1e-6


def test_edits_act_in_the_order_written() -> None:
    x = torch.randn(2, 13, D)
    outputs = []
    for edits in ([partial(QKNorm, norm=LayerNorm), RoPE], [RoPE, partial(QKNorm, norm=LayerNorm)]):
        torch.manual_seed(0)
        outputs.append(attention(edits=edits)(SITE)(x, carry_of(x)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, r"layer 0: d_model=32 does not split into n_heads=5; nearby counts that do: \[1, 2, 4, 8\]"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_heads": -4}, "n_heads=-4"),
        ({"n_heads": 0, "n_kv_heads": 1, "head_dim": 8}, "n_heads=0"),
        ({"n_kv_heads": 3}, r"n_heads=4 does not group into n_kv_heads=3; choose of \[1, 2, 4\]"),
        ({"n_kv_heads": 0}, r"n_kv_heads=0; choose of \[1, 2, 4\]"),
        ({"n_kv_heads": 8}, r"n_kv_heads=8; choose of \[1, 2, 4\]"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"core": None}, "attention.core: empty"),
        ({"edits": [RoPE, None]}, r"attention.edits\[1\]: empty"),
        ({"core": lambda heads: len}, "attention.core: builtin_function_or_method is not a torch.nn.Module"),
    ],
)
def test_a_mistake_is_told_when_building(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**changes)(SITE)


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("out_bias", [False, True])
def test_each_bias_stands_where_its_flag_says(qkv_bias: bool, out_bias: bool) -> None:
    linear = {
        partial(attention()): {"qkv": qkv_bias, "out": out_bias},
        partial(LowRankAttention, n_heads=4, core=SDPA, rank=3): {
            "q": qkv_bias, "kv_down": False, "kv_up": qkv_bias, "out": out_bias,
        },
    }  # fmt: skip
    for part, expected in linear.items():
        module = part(SITE, qkv_bias=qkv_bias, out_bias=out_bias)
        maps = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        assert {name: m.bias is not None for name, m in maps.items()} == expected


@pytest.mark.parametrize("core", [SoftCapped, partial(Dilated, segments=[8, 16], dilations=[1, 2])])
def test_a_core_returns_the_dtype_of_its_values(core: Callable) -> None:
    """Edits may leave queries and keys wide; SDPA refuses to mix."""
    q, k = torch.randn(2, 4, 13, 8), torch.randn(2, 2, 13, 8)
    v = torch.randn(2, 2, 13, 8).bfloat16()
    y, exact = (core(heads(4, 2, 8))(q, k, values) for values in (v, v.float()))
    assert y.dtype == torch.bfloat16
    assert exact.dtype == torch.float32
    assert (y - exact).abs().max() < 2**-7 * exact.abs().max()


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan])
def test_a_dropout_that_is_no_probability_is_refused(dropout: float) -> None:
    """1 too: it would leave nothing."""
    expected = rf"{dropout} \(expected 0 or more, and below 1\)"
    with pytest.raises(ValueError, match=rf"layer 0: SDPA\.dropout: {expected}"):
        SDPA(heads(4, 2, 8), dropout)
    with pytest.raises(ValueError, match=rf"layer 0: Block\.dropout: {expected}"):
        block(dropout=dropout)(SITE)


def test_a_dropout_below_1_is_taken() -> None:
    assert SDPA(heads(4, 2, 8), 0.99).dropout == block(dropout=0.99)(SITE).mlp.drop.p == 0.99


# ---------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("theta", [0.0, -1e4, math.inf, math.nan])
def test_a_base_without_frequencies_is_refused(theta: float) -> None:
    sizes = {"kv_rank": 6, "nope_dim": 4, "rope_dim": 4, "v_dim": 8}
    for name, build in {
        "RoPE": lambda: RoPE(heads(4, 2, 8), theta),
        "LatentAttention": lambda: LatentAttention(SITE, 4, SDPA, RMSNorm, **sizes, theta=theta),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}\.theta: {theta} \(expected a positive number, such as 10000"):
            build()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 400), st.integers(0, 400), st.integers(0, 600), st.sampled_from([2, 6, 8, 64]),
    st.sampled_from([1e4, 1e6]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_scores_depend_on_the_distance_alone(i: int, j: int, shift: int, dim: int, theta: float, seed: int) -> None:
    q, k = torch.randn(2, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    angle = angles(1001, dim, theta, torch.device("cpu")).double()

    def score(a: int, b: int) -> Tensor:
        return rotate(q, angle[a]) @ rotate(k, angle[b])

    assert abs(score(i, j) - score(i + shift, j + shift)) < 3e-4 * q.norm() * k.norm()  # angles are float32
    assert abs(rotate(q, angle[i]).norm() - q.norm()) < 1e-9


def test_rotation_leaves_position_0_alone_and_v_everywhere() -> None:
    q, k, v = torch.randn(3, 2, 4, 13, 8)
    new_q, new_k, new_v = RoPE(heads(4, 4, 8))(q, k, v, carry_of(v))
    assert torch.equal(new_q[..., 0, :], q[..., 0, :])
    assert (new_q[..., 1:, :] - q[..., 1:, :]).abs().amax(-1).min() > 1e-3
    assert not torch.equal(new_k, k)
    assert new_v is v


def test_angles_are_exact_in_a_bf16_model() -> None:
    x = torch.randn(1, 1, 300, 64)
    exact = rotate(x, angles(300, 64, 1e4, x.device))
    gap = (rotate(x.bfloat16(), angles(300, 64, 1e4, x.device)).float() - exact).abs().max()
    assert gap < 0.03  # the rounding of x and of the result; bfloat16 angles would be off by whole turns
    assert rotate(x.bfloat16(), angles(300, 64, 1e4, x.device)).dtype == torch.bfloat16


# ---------------------------------------------------------------------- norms, activations, MLPs


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_norms_equal_their_formulas(scale: float) -> None:
    x = scale * torch.randn(2, 5, D, dtype=torch.float64) + scale
    rms, layer = shake(RMSNorm(D).double()), shake(LayerNorm(D).double())
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * rms.weight
    assert (rms(x) - expected).abs().max() < 1e-12
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias
    assert (layer(x) - expected).abs().max() < 1e-12


def test_norms_take_their_statistics_in_float32() -> None:
    x = 300 * torch.randn(4, 256)
    for norm in (RMSNorm(256), LayerNorm(256), LayerNorm(256, bias=False)):
        exact = norm(x.bfloat16().float())
        y = norm(x.bfloat16())
        assert y.dtype == torch.bfloat16
        assert ((y.float() - exact).abs() <= 2**-8 * exact.abs()).all()  # one rounding of the result, nothing more
        half = norm(x.half())
        assert half.isfinite().all()  # the sum of squares overflows float16


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_zero_vector_stays_zero(norm: type) -> None:
    assert torch.equal(norm(D)(torch.zeros(2, D)), torch.zeros(2, D))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_an_eps_below_0_is_refused(norm: type) -> None:
    for eps in (-1e-6, math.inf, math.nan):
        with pytest.raises(ValueError, match=rf"^{norm.__name__}\.eps: {eps} \(expected 0 or a positive number"):
            norm(D, eps)
    y = norm(D, 0.0)(1e-9 * torch.randn(2, 5, D))  # 0 is an eps: however small the input, the output has its size
    assert (y.square().mean(-1) - 1).abs().max() < 1e-5


def test_activations_equal_their_formulas() -> None:
    x = torch.linspace(-6, 6, 201, dtype=torch.float64)
    tanh = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    formulas = {
        SiLU(): x / (1 + torch.exp(-x)),
        GELU(): x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        GELU(tanh=True): tanh,
        ReLU2(): torch.where(x > 0, x * x, 0),
    }
    for activation, expected in formulas.items():
        assert (activation(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_mlps_equal_their_formulas(bias: bool) -> None:
    x = torch.randn(2, 5, D, dtype=torch.float64)
    plain = shake(MLP(SITE, GELU, ratio=1.5, bias=bias).double())
    gated = shake(GatedMLP(SITE, SiLU, ratio=1.5, bias=bias).double())
    zero = torch.zeros((), dtype=x.dtype)
    expected = plain.activation(x @ plain.up.weight.T + (plain.up.bias if bias else zero)) @ plain.down.weight.T
    assert (plain(x, carry_of(x)) - expected - (plain.down.bias if bias else zero)).abs().max() < 1e-12
    hidden = x @ gated.gate_up.weight.T + (gated.gate_up.bias if bias else zero)  # the gate's rows first
    gate, up = hidden[..., :48], hidden[..., 48:]
    expected = (gate * torch.sigmoid(gate) * up) @ gated.down.weight.T + (gated.down.bias if bias else zero)
    assert (gated(x, carry_of(x)) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("ratio", [0.0, -1.0, 0.5 / D, math.inf, math.nan])
def test_a_ratio_that_leaves_no_hidden_number_is_refused(ratio: float) -> None:
    for part in (partial(MLP, activation=GELU), partial(GatedMLP, activation=SiLU)):
        name = part.func.__name__
        message = rf"^layer 0: {name}\.ratio: {ratio} leaves no hidden number at d_model=32 \(expected 0.03125 or more"
        with pytest.raises(ValueError, match=message):
            part(SITE, ratio=ratio)
        assert part(SITE, ratio=1 / D).down.in_features == 1


def test_the_gate_is_not_symmetric() -> None:
    """A test of the test above: with its halves swapped a gated MLP is another function."""
    x = torch.randn(2, 5, D)
    gated = shake(GatedMLP(SITE, SiLU))
    before = gated(x, carry_of(x))
    with torch.no_grad():
        gated.gate_up.weight.copy_(gated.gate_up.weight.roll(len(gated.gate_up.weight) // 2, 0))
    assert (gated(x, carry_of(x)) - before).abs().max() > 1e-3


@pytest.mark.parametrize("part", [attention(), attention(edits=[partial(QKNorm, norm=LayerNorm), RoPE])])
def test_bf16_is_close_to_float32(part: partial) -> None:
    module = shake(part(SITE))
    x = torch.randn(2, 23, D)
    exact = module(x, carry_of(x))
    low: nn.Module = module.bfloat16()
    y = low(x.bfloat16(), carry_of(x))
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() < 3e-2 * exact.abs().max()


class Shapes(TorchDispatchMode):
    """The shapes that every attention kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[tuple[int, ...]]] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if "attention" in str(func):
            self.seen.append([tuple(a.shape) for a in args if isinstance(a, torch.Tensor)])
        return func(*args, **(kwargs or {}))


def test_grouped_keys_and_values_are_never_repeated() -> None:
    """The kernel and its backward read G heads of keys and values, and nothing expands them on the way."""
    q = torch.randn(2, 8, 16, 32, requires_grad=True)
    k, v = (torch.randn(2, 2, 16, 32, requires_grad=True) for _ in range(2))
    with Shapes() as shapes:
        SDPA(heads(8, 2, 32))(q, k, v).square().sum().backward()
    forward, backward = shapes.seen
    assert forward[1:3] == [(2, 2, 16, 32)] * 2
    assert backward[2:4] == [(2, 2, 16, 32)] * 2
    assert not [name for name in shapes.names if "repeat" in name]
    assert k.grad.shape == (2, 2, 16, 32)
