"""Pattention against its formula written token by token, its symmetries, and the TokenFormer made of it."""

from functools import partial

import pytest
import torch
from helpers import SITE, D, L, T, V, batch, block, carry_of, check_variant, shake, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.base import Site, count
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp_pattention import PattentionMLP
from blagpt_pl.nn.norm import LayerNorm
from blagpt_pl.nn.pattention import KEY_STD, OutputPattention, Pattention

N = 48
plain_norm = partial(LayerNorm, gain=False, bias=False)
mixer = partial(PattentionAttention, n_heads=4, n_tokens=N, core=SDPA, edits=[RoPE])


def tokenformer(**changes: object) -> BlaGPT:
    """TokenFormer, small."""
    tokens = block(norm=plain_norm, attention=mixer, mlp=partial(PattentionMLP, n_tokens=2 * N))
    return tiny(**{"block": tokens, "norm": LayerNorm, "init": GPT2Init(zero_outputs=False), **changes})


def written_out(keys: Tensor, values: Tensor, x: Tensor, eps: float, n: int | None = None) -> Tensor:
    """The twin: keys (N, D_in) and values (N, D_out) as the paper has them, one vector x (D_in), one token at a time.

    Under the root stands n, all tokens by default.
    """
    n = len(keys) if n is None else n
    scores = [sum(k * y for k, y in zip(key.tolist(), x.tolist(), strict=True)) for key in keys]
    length = (sum(a * a for a in scores) + n * eps) ** 0.5
    y = torch.zeros(values.shape[1], dtype=x.dtype)
    for a, value in zip(scores, values, strict=True):
        s = torch.tensor(a * n**0.5 / length, dtype=x.dtype)
        y += s * (1 + torch.erf(s / 2**0.5)) / 2 * value
    return y


def pattention(d_in: int = 6, d_out: int = 5, n_tokens: int = 7, **options: float) -> Pattention:
    return Pattention(SITE, d_in, d_out, n_tokens, **options).double()


def with_tokens(keys: Tensor, values: Tensor, **options: float) -> Pattention:
    """Keys (N, D_in) and values (N, D_out)."""
    part = pattention(keys.shape[1], values.shape[1], len(keys), **options)
    part.load_state_dict({"keys": keys, "values": values.T})
    return part


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99))
def test_it_equals_its_twin(d_in: int, d_out: int, n: int, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    part = shake(pattention(d_in, d_out, n, eps=eps), std=1.0, seed=seed)
    x = torch.randn(3, 4, d_in, dtype=torch.float64)
    rows = [written_out(part.keys, part.values.T, row, eps) for row in x.flatten(0, 1)]
    assert (part(x).flatten(0, 1) - torch.stack(rows)).abs().max() < 1e-12


def test_the_twin_tells_the_variants_apart() -> None:
    """The norm before the GELU, over the tokens; exact GELU: each other choice shows."""
    part, x = shake(pattention(), std=1.0), torch.randn(4, 6, dtype=torch.float64)
    scores = x @ part.keys.T
    unit = scores * 7**0.5 / scores.norm(dim=-1, keepdim=True)
    gelu = nn.functional.gelu
    twin = torch.stack([written_out(part.keys, part.values.T, row, part.eps) for row in x])
    after = gelu(scores) * 7**0.5 / gelu(scores).norm(dim=-1, keepdim=True)
    for other in (gelu(unit, approximate="tanh"), after, gelu(unit / 7**0.5), unit.softmax(-1)):
        assert (other @ part.values.T - twin).abs().max() > 1e-4
    assert (gelu(unit) @ part.values.T - twin).abs().max() < 1e-5  # the paper's: eps = 0


def test_a_zero_row_gives_zero_and_finite_gradients() -> None:
    part = shake(pattention(), std=1.0)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    x[0, 1] = 0
    x.requires_grad_()
    y = part(x)
    assert not y[0, 1].any()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, part.keys, part.values))
    slope = 0.5 * part.eps**-0.5 * part.values.sum(0) @ part.keys  # gelu'(0) is a half
    assert (x.grad[0, 1] - slope).abs().max() < 1e-9 * slope.abs().max()


@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e4])
def test_a_positive_factor_on_all_keys_changes_nothing(factor: float) -> None:
    keys, values = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    one, other = (with_tokens(k, values, eps=1e-12)(x) for k in (keys, factor * keys))
    assert (one - other).abs().max() < 1e-6
    assert (with_tokens(-keys, values)(x) - one).abs().max() > 0.1  # but the sign matters


def test_tokens_have_no_order() -> None:
    keys, values = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    x, order = torch.randn(4, 6, dtype=torch.float64), torch.randperm(7)
    gap = with_tokens(keys[order], values[order])(x) - with_tokens(keys, values)(x)
    assert gap.abs().max() < 1e-12


def test_doubled_tokens_with_halved_values_are_the_same_map() -> None:
    keys, values = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    grown = with_tokens(keys.repeat(2, 1), values.repeat(2, 1) / 2)
    assert (grown(x) - with_tokens(keys, values)(x)).abs().max() < 1e-12


def test_new_tokens_with_zero_keys_add_nothing_but_rescale_the_others() -> None:
    """Section 3.3 holds with the old N under the square root; with the new one every score grows."""
    keys, values = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64)
    more = torch.cat([keys, torch.zeros(3, 6, dtype=torch.float64)])
    grown = [with_tokens(more, torch.cat([values, v]))(x) for v in torch.randn(2, 3, 5, dtype=torch.float64)]
    assert torch.equal(*grown)  # whatever the new values
    assert (grown[0] - with_tokens(keys, values)(x)).abs().max() > 0.01
    scores = x @ keys.T
    unit = scores * 10**0.5 / scores.norm(dim=-1, keepdim=True)
    assert (grown[0] - nn.functional.gelu(unit) @ values).abs().max() < 1e-5


# ---------------------------------------------------------------------- growing


def grown_out_of(part: Pattention, n_tokens: int, **options: float) -> Pattention:
    """One with more tokens that has taken over those of a smaller one."""
    options = {"grown_from": part.mean_over, "eps": part.eps, **options}
    larger = Pattention(SITE, part.keys.shape[1], len(part.values), n_tokens, **options).to(part.keys.dtype)
    larger.load_state_dict(larger.grown(part.state_dict()))
    return larger


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(1, 5), st.sampled_from([1e-6, 0.3, 20.0]), st.integers(0, 99))
def test_a_grown_one_equals_its_twin(n: int, more: int, eps: float, seed: int) -> None:
    """Values and gradients, whatever its tokens have become."""
    torch.manual_seed(seed)
    part = shake(pattention(4, 3, n + more, eps=eps, grown_from=n), std=1.0, seed=seed)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    twin = torch.stack([written_out(part.keys, part.values.T, row, eps, n) for row in x])
    assert (part(x) - twin).abs().max() < 1e-12
    a = x @ part.keys.T
    naive = nn.functional.gelu(a / (a.square().sum(-1, keepdim=True) / n + eps).sqrt()) @ part.values.T
    weights = torch.randn_like(naive)
    tensors = (x, part.keys, part.values)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), tensors) for y in (part(x), naive))
    assert all(
        (one - other).abs().max() < 1e-10 * (1 + other.abs().max()) for one, other in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("eps", [1e-6, 0.3, 20.0])
def test_growing_changes_no_output(eps: float) -> None:
    """Section 3.3, once and once more; as the number of tokens goes under the root instead, it does."""
    part, x = shake(pattention(eps=eps), std=1.0), torch.randn(4, 6, dtype=torch.float64)
    once = grown_out_of(part, 10)
    twice = grown_out_of(shake(once, std=1.0), 25)
    assert twice.mean_over == once.mean_over == len(part.keys) == 7
    assert (twice(x) - once(x)).abs().max() < 1e-12
    assert (grown_out_of(part, 10)(x) - part(x)).abs().max() < 1e-12
    counting_all = with_tokens(twice.keys, twice.values.T, eps=eps)
    assert (counting_all(x) - once(x)).abs().max() > 1e-3


def test_the_mean_of_a_grown_one_is_made_as_ever() -> None:
    """In float32 within its rounding, in bfloat16 within its own; one that has not grown computes as it always did."""
    part, x = shake(Pattention(SITE, 32, 32, 64)), torch.randn(64, 32)
    assert (grown_out_of(part, 256)(x) - part(x)).abs().max() < 1e-6 * part(x).abs().max()
    weights = nn.functional.gelu(nn.functional.rms_norm(x @ part.keys.T, (64,), eps=1e-6))
    assert torch.equal(part(x), weights @ part.values.T)
    low = part.bfloat16()
    assert (grown_out_of(low, 256)(x.bfloat16()) - low(x.bfloat16())).abs().max() < 0.01 * low(x.bfloat16()).abs().max()


def test_new_tokens_start_with_keys_of_zero_and_learn() -> None:
    """Their values are not zero, not even where outputs are to be: a token with neither would never have a gradient."""
    part = OutputPattention(SITE, 6, 5, 40, grown_from=30)
    for std, old in ((0.02, part.value_std), (0.0, 0.0)):
        part.start_output(std)
        assert part.values[:, :30].std().item() == pytest.approx(old, rel=0.3)
        assert part.values[:, 30:].std().item() == pytest.approx(part.value_std, rel=0.3)
        assert part.keys[:30].all() and not part.keys[30:].any()
        y = part(torch.randn(3, 6))
        assert y.any() == bool(std)
        part.keys.grad = None
        y.square().sum().backward() if std else y.sum().backward()
        assert part.keys.grad[30:].all()


def test_a_checkpoint_says_what_its_mean_is_over() -> None:
    assert list(pattention().state_dict()) == ["keys", "values"]
    state = pattention(n_tokens=9, grown_from=7).state_dict()
    assert list(state) == ["keys", "values", "counted"]
    assert state["counted"].dtype == torch.int64 and state["counted"].item() == 7
    with pytest.raises(RuntimeError, match="counted: grown_from is 7 there, 6 here"):
        pattention(n_tokens=9, grown_from=6).load_state_dict(state)
    for strange in ({"n_tokens": 9}, {"n_tokens": 9, "grown_from": 6}):
        with pytest.raises(RuntimeError, match="counted"):
            pattention(**strange).load_state_dict(state)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ((7, None), (9, None), "a mean over 7 tokens there, over 9 here; fix: grown_from: 7"),
        ((7, None), (9, 5), "a mean over 7 tokens there, over 5 here; fix: grown_from: 7"),
        ((7, 4), (9, 7), "a mean over 4 tokens there, over 7 here; fix: grown_from: 4"),
        ((7, 4), (7, None), "a mean over 4 tokens there, over 7 here; fix: grown_from: 4"),
        ((7, None), (7, 4), "a mean over 7 tokens there, over 4 here; fix: leave grown_from out"),
        ((7, None), (6, None), r"7 tokens there, 6 here \(expected as many or more\); fix: n_tokens: 7"),
    ],
)
def test_growth_that_would_change_the_function_is_refused(old: tuple, new: tuple, message: str) -> None:
    donor, part = (pattention(n_tokens=n, grown_from=n_0) for n, n_0 in (old, new))
    with pytest.raises(ValueError, match=message):
        part.grown(donor.state_dict())


def test_what_is_no_smaller_pattention_is_handed_on() -> None:
    part = pattention()
    for strange in ({}, {"weight": part.keys}, pattention(d_in=5).state_dict(), pattention(d_out=4).state_dict()):
        assert part.grown(strange) is strange


def test_a_grown_tokenformer_keeps_all_promises() -> None:
    grown = block(
        norm=plain_norm,
        attention=partial(mixer, n_tokens=2 * N, grown_from=N),
        mlp=partial(PattentionMLP, n_tokens=4 * N, grown_from=2 * N),
    )
    model = tokenformer(block=grown, init=GPT2Init(zero_outputs=True))
    small, around = tokenformer(), V * D + 2 * D
    more = count(small.parameters()) - around
    assert count(model.parameters()) == count(small.parameters()) + more
    assert model.flops_per_token() == small.flops_per_token() + 6 * more
    check_variant(model)


# ---------------------------------------------------------------------- as it starts, and its size


@pytest.mark.parametrize(("n_layers", "width"), [(2, 32), (12, 128)])
def test_standard_deviations(n_layers: int, width: int) -> None:
    part = Pattention(Site(width, n_layers, 0, V, T), 64, 48, 512)
    for tensor, std in ((part.keys, KEY_STD), (part.values, 2 / (n_layers * width**0.5))):
        assert abs(tensor.std().item() / std - 1) < 5 / (2 * tensor.numel()) ** 0.5  # five standard errors


def test_an_init_leaves_the_start_alone_but_for_zero_outputs() -> None:
    for zero in (True, False):
        for module in tokenformer(init=GPT2Init(zero_outputs=zero, std=7.0)).modules():
            if isinstance(module, Pattention):
                assert 0.9 < module.keys.std() / KEY_STD < 1.1
                expected = 0.0 if zero and isinstance(module, OutputPattention) else 2 / (L * D**0.5)
                assert module.values.std().item() == pytest.approx(expected, rel=0.15)


def test_zero_outputs_make_every_block_the_identity() -> None:
    x = torch.randn(2, 23, D)
    for layer in tokenformer(init=GPT2Init(zero_outputs=True)).blocks:
        assert torch.equal(layer(x, carry_of(x)), x)
    for layer in tokenformer().blocks:
        assert (layer(x, carry_of(x)) - x).abs().max() > 0.1


@pytest.mark.parametrize(("n_kv", "head_dim"), [(None, None), (2, None), (1, 6)])
def test_the_attention_equals_plain_attention_of_pattentions(n_kv: int | None, head_dim: int | None) -> None:
    part = shake(mixer(SITE, n_kv_heads=n_kv, head_dim=head_dim, edits=[]).double())
    h, x = part.heads, torch.randn(2, 13, D, dtype=torch.float64)
    q, k, v = (
        torch.stack([written_out(p.keys, p.values.T, row, p.eps) for row in x.flatten(0, 1)]).unflatten(0, (2, 13))
        for p in (part.q, part.k, part.v)
    )
    mask = torch.ones(13, 13, dtype=torch.bool).triu(1)
    read = []
    for i in range(h.n):
        j = i // (h.n // h.n_kv)
        one, theirs = slice(i * h.dim, (i + 1) * h.dim), slice(j * h.dim, (j + 1) * h.dim)
        scores = q[..., one] @ k[..., theirs].transpose(1, 2) / h.dim**0.5
        read.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ v[..., theirs])
    y = part.out(torch.cat(read, -1))
    assert (part(x, carry_of(x)) - y).abs().max() < 1e-10
    assert y.abs().max() > 0.01


@pytest.mark.parametrize(("n_kv", "head_dim"), [(4, 8), (2, 8), (1, 6)])
def test_the_size_follows_the_formula(n_kv: int, head_dim: int) -> None:
    attention = partial(mixer, n_kv_heads=n_kv, head_dim=head_dim)
    model = tokenformer(block=block(norm=plain_norm, attention=attention, mlp=partial(PattentionMLP, n_tokens=2 * N)))
    tokens = N * (4 * D + 2 * (4 + n_kv) * head_dim) + 2 * D * 2 * N
    assert count(model.parameters()) == V * D + L * tokens + 2 * D
    assert {role for name, role in model.parameter_roles().items() if name.startswith("blocks.")} == {"matrix"}
    reading = 3 * L * 2 * T * 4 * head_dim
    assert model.flops_per_token() == 6 * (L * tokens + V * D) + reading


def test_the_first_loss_is_that_of_a_guess_and_promises_hold() -> None:
    check_variant(tokenformer())


def test_bf16_stays_finite_and_near() -> None:
    model = tokenformer()
    exact, _ = model.objective(*batch(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.objective(*batch(model))
    loss.backward()
    assert abs(loss - exact) < 0.01 * exact
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_norm_is_made_in_float32() -> None:
    """Scores and weights are rounded to bfloat16, but nothing between them: as if made in float64, unlike in bfloat16."""
    part, x = shake(Pattention(SITE, 32, 32, 512)).bfloat16(), torch.randn(64, 32).bfloat16()
    scores = x @ part.keys.T

    def differing(dtype: torch.dtype) -> float:
        a = scores.to(dtype)
        weights = nn.functional.gelu(a * a.square().mean(-1, keepdim=True).rsqrt()).bfloat16()
        return (weights @ part.values.T != part(x)).float().mean().item()

    assert part(x).dtype == torch.bfloat16
    assert differing(torch.float64) < 0.1
    assert differing(torch.bfloat16) > 0.3


@pytest.mark.parametrize("grown_from", [None, 12])
def test_it_compiles_without_a_break(grown_from: int | None) -> None:
    torch._dynamo.reset()
    part = shake(mixer(SITE, grown_from=grown_from))
    x = torch.randn(2, 13, D)
    compiled = torch.compile(part, backend="aot_eager", fullgraph=True, dynamic=False)(x, carry_of(x))
    assert (compiled - part(x, carry_of(x))).abs().max() < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_norm_learns_what_it_is_asked_to(gain: bool, bias: bool) -> None:
    norm, x = LayerNorm(D, gain=gain, bias=bias), torch.randn(3, D)
    assert [name for name, _ in norm.named_parameters()] == ["weight"] * gain + ["bias"] * bias
    shake(norm)
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
    y = (y if norm.weight is None else y * norm.weight) + (0 if norm.bias is None else norm.bias)
    assert (norm(x) - y).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Pattention, SITE, 4, 4, 0), r"layer 0: Pattention with n_tokens=0 \(expected 1 or more\)"),
        (partial(Pattention, SITE, 4, 4, 4, eps=0.0), r"layer 0: Pattention with eps=0.0 \(expected above 0"),
        (partial(PattentionMLP, SITE, n_tokens=-1), "n_tokens=-1"),
        (partial(Pattention, SITE, 4, 4, 4, grown_from=4), r"layer 0: .* grown_from=4, n_tokens=4 \(expected fewer"),
        (partial(PattentionMLP, SITE, n_tokens=4, grown_from=0), "grown_from=0, n_tokens=4 .*; fix: leave grown_from"),
        (partial(mixer, SITE, grown_from=N + 1), "grown_from=49, n_tokens=48"),
        (partial(mixer, SITE, n_heads=5), "d_model=32 does not split into n_heads=5"),
        (partial(mixer, SITE, n_kv_heads=3), "does not group into n_kv_heads=3"),
    ],
)
def test_what_cannot_be_built_is_told(build: partial, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
