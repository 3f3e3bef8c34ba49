"""RWKV-7's mixers: their formula step by step, their pieces, their start, and what they refuse."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SITE, D, L, T, V, attention, block, carry_of, shake, tiny
from naive_delta import naive_dplr
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, Site, count
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.nn.recurrent import kernels, rwkv7
from blagpt_pl.nn.recurrent.rwkv7 import FIRST, RWKV7TimeMix
from blagpt_pl.nn.recurrent.rwkv7_channel import RWKV7ChannelMix
from blagpt_pl.nn.recurrent.rwkv7_init import OrthogonalLinear, RWKV7Init
from blagpt_pl.nn.roles import roles_of
from blagpt_pl.nn.states import States

K = 8
time_mix = partial(RWKV7TimeMix, head_dim=K)
goose = partial(Block, norm=LayerNorm, attention=time_mix, mlp=RWKV7ChannelMix)
small = partial(tiny, embedding_norm=LayerNorm, norm=LayerNorm, block=goose, init=RWKV7Init())


def at(layer: int) -> Site:
    return replace(SITE, layer=layer)


def stream(length: int, seed: int = 0) -> Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- the formula


def written_out(part: RWKV7TimeMix, x: Tensor, first: Tensor | None) -> Tensor:
    """The whole of it by the paper's formula, in its orientation and with its softplus, one step after the other."""
    heads, decay = D // K, []
    out, before = [], torch.zeros(2, D, dtype=x.dtype)
    rows: dict[str, list[Tensor]] = {name: [] for name in "rkvabg"}
    for t in range(x.shape[1]):
        r_in, w_in, k_in, v_in, a_in, g_in = (x[:, t] + (before - x[:, t]) * share for share in part.mix)
        before = x[:, t]
        k, v = k_in @ part.k.weight.T, v_in @ part.v.weight.T
        d = part.decay + torch.tanh(w_in @ part.to_decay.down) @ part.to_decay.up
        rate = torch.sigmoid(part.rate + a_in @ part.to_rate.down @ part.to_rate.up)
        unit = F.normalize((k * part.removal).view(2, heads, K), dim=-1).view(2, D)
        if first is not None:
            v = v + (first[:, t] - v) * torch.sigmoid(part.value + v_in @ part.to_value.down @ part.to_value.up)
        decay.append(-torch.exp(-F.softplus(-d) - 0.5))
        found = {
            "r": r_in @ part.r.weight.T, "k": k + k * (rate - 1) * part.mildness, "v": v, "a": -unit, "b": unit * rate,
            "g": torch.sigmoid(g_in @ part.to_gate.down) @ part.to_gate.up,
        }  # fmt: skip
        for name, value in found.items():
            rows[name].append(value)
    r, k, v, a, b, w = (torch.stack(s, 1).view(2, -1, heads, K) for s in (*(rows[n] for n in "rkvab"), decay))
    y, _ = naive_dplr(r, w, k, v, a, b)
    for t in range(x.shape[1]):
        one = y[:, t]  # (2, H, K)
        mean, var = one.mean(-1, keepdim=True), one.var(-1, unbiased=False, keepdim=True)
        normed = ((one - mean) / torch.sqrt(var + 64e-5)).reshape(2, D) * part.norm.weight + part.norm.bias
        bonus = torch.einsum("bhk,bhk,hk->bh", r[:, t], k[:, t], part.bonus)
        out.append((normed + (bonus[..., None] * v[:, t]).reshape(2, D)) * rows["g"][t])
    return torch.stack(out, 1) @ part.out.weight.T


@pytest.mark.parametrize("length", [1, 13, 32, 37])
@pytest.mark.parametrize("layer", [0, 1])
def test_it_is_its_formula(layer: int, length: int) -> None:
    part, x = shake(time_mix(at(layer)), 0.2).double(), stream(length)
    first = stream(length, 1).requires_grad_() if layer else None
    weights, found = stream(length, 2), []
    leaves = [*part.parameters(), *([first] if layer else [])]
    fast = part(x, Carry(torch.zeros(2, length, dtype=torch.int64), x, {FIRST: first} if layer else None))
    for y in (fast, written_out(part, x, first)):
        found.append([y, *torch.autograd.grad((y * weights).sum(), leaves, allow_unused=length == 1)])
    gaps = [(a - b).abs().max().item() for a, b in zip(*found, strict=True) if a is not None or b is not None]
    assert max(gaps) < 1e-10


def test_first_values_are_those_of_layer_0() -> None:
    part, x = shake(time_mix(at(0)), 0.2), stream(13).float()
    carry = carry_of(x)
    part(x, carry)
    mixed = x + (F.pad(x, (0, 0, 1, -1)) - x) * part.mix[3]
    assert torch.equal(carry.memo[FIRST], part.v(mixed))
    later = shake(time_mix(at(1)), 0.2)
    assert (later(x, carry) - later(x, Carry(carry.tokens, x, {FIRST: torch.zeros_like(x)}))).abs().max() > 1e-3
    assert part.value is None and part.to_value is None
    with pytest.raises(ValueError, match="layer 1: RWKV7TimeMix mixes in the values of layer 0, which left none"):
        later(x, carry_of(x))


@pytest.mark.parametrize("length", [1, 7])
def test_a_channel_mixer_is_its_formula(length: int) -> None:
    part, x = shake(RWKV7ChannelMix(at(1), 3.5), 0.2).double(), stream(length)
    expected, before = [], torch.zeros(2, D, dtype=x.dtype)
    for now in x.unbind(1):
        hidden = (now * (1 - part.mix) + before * part.mix) @ part.up.weight.T
        expected.append(torch.where(hidden > 0, hidden**2, 0) @ part.down.weight.T)
        before = now
    assert part.up.weight.shape == (112, D)
    assert (part(x, carry_of(x)) - torch.stack(expected, 1)).abs().max() < 1e-12


# ---------------------------------------------------------------------- piece by piece


@pytest.mark.parametrize("sizes", [(33, 40), (1,) * 6, (4, 1, 50, 2)])
def test_pieces_are_the_whole(sizes: tuple[int, ...]) -> None:
    model = shake(small(context=73), 0.1).double().eval()
    tokens = torch.randint(V, (2, sum(sizes)), generator=torch.Generator().manual_seed(3))
    assert model.can_continue()
    whole, states = model(tokens), States()
    for piece in tokens.split(sizes, dim=1):
        x, carry = model.trunk(piece, states)
        logits = model.head(model.finish(x, carry))
        end = states.start + piece.shape[1]
        assert (logits - whole[:, states.start : end]).abs().max() < 1e-10
        states = states.after(piece.shape[1])
    assert not states.grows
    (last, state), (recent,) = states.take(), states.take()
    assert last.shape == recent.shape == (2, D) and state.shape == (2, D // K, K, K)


def test_states_of_low_precision_are_kept_wide() -> None:
    part, x = shake(time_mix(at(0)), 0.2).bfloat16(), stream(9).bfloat16()
    states = States()
    part(x, Carry(torch.zeros(2, 9, dtype=torch.int64), x, states=states))
    assert [t.dtype for t in states.after(9).take()] == [torch.float32] * 2


# ---------------------------------------------------------------------- roles, sizes, kernels, precision


def test_roles() -> None:
    model = small(head=LinearHead)
    roles = roles_of(model, model.head)
    for layer in range(L):
        said = {n.removeprefix(f"blocks.{layer}."): r for n, r in roles.items() if n.startswith(f"blocks.{layer}.")}
        assert [n for n, r in said.items() if r == "timescale"] == ["attention.part.decay"]
        matrices = {n for n, r in said.items() if r == "matrix"}
        assert matrices == {f"attention.part.{n}.weight" for n in ("r", "k", "v", "out")} | {
            f"mlp.part.{n}.weight" for n in ("up", "down")
        }
        vectors = {n.rsplit(".", 2)[-2] for n, r in said.items() if r == "vector"}
        assert vectors == {"norm"}
        assert sum(r == "recurrence" for r in said.values()) == (5 + 6 if layer == 0 else 6 + 8) + 1


@pytest.mark.parametrize(("width", "ranks"), [(768, (64, 64, 32, 128)), (1024, (64, 64, 64, 160)), (32, (32,) * 4)])
def test_ranks_and_parameters(width: int, ranks: tuple[int, ...]) -> None:
    for layer in (0, 1):
        with torch.device("meta"):
            part = RWKV7TimeMix(replace(SITE, d_model=width, layer=layer), head_dim=32)
            mlp = RWKV7ChannelMix(replace(SITE, d_model=width, layer=layer), 3.5)
        maps = [part.to_decay, part.to_rate, part.to_value, part.to_gate]
        assert [m.up.shape[0] for m in maps if m] == [r for i, r in enumerate(ranks) if layer or i != 2]
        used = sum(ranks) - (0 if layer else ranks[2])
        assert count(part.parameters()) == 4 * width**2 + 2 * width * used + (14 if layer else 13) * width
        assert count(mlp.parameters()) == 7 * width**2 + width
    given = RWKV7TimeMix(at(1), 8, decay_rank=3, rate_rank=4, value_rank=5, gate_rank=6)
    assert [m.up.shape[0] for m in (given.to_decay, given.to_rate, given.to_value, given.to_gate)] == [3, 4, 5, 6]


def test_wrong_sizes_are_told() -> None:
    with pytest.raises(ValueError, match="head_dim: 12 does not go into d_model 32; nearby ones that do: .*8, 16"):
        RWKV7TimeMix(SITE, head_dim=12)
    with pytest.raises(ValueError, match=r"RWKV7TimeMix.head_dim: 0 \(expected 1 or more\)"):
        RWKV7TimeMix(SITE, head_dim=0)
    with pytest.raises(ValueError, match=r"layer 1: RWKV7TimeMix.gate_rank: 0 \(expected 1 or more\)"):
        RWKV7TimeMix(at(1), 8, gate_rank=0)
    with pytest.raises(ValueError, match="RWKV7ChannelMix.ratio"):
        RWKV7ChannelMix(SITE, 0)


def test_the_kernel_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = shake(time_mix(at(0)), 0.2), stream(9).float()
    expected = part(x, carry_of(x))
    assert part.kernel(x.device, torch.bfloat16, 1024) == "chunks of 32"
    calls = []
    monkeypatch.setattr(kernels, "available", lambda device, dtype=None: True)
    monkeypatch.setattr(kernels, "dplr", lambda *given: calls.append(len(given)) or rwkv7.dplr(*given))
    assert torch.equal(part(x, carry_of(x)), expected) and calls == [6]
    assert part.kernel(x.device, torch.bfloat16, 1024) == kernels.NAME


def test_bfloat16_stays_close() -> None:
    model = shake(small(), 0.1).eval()
    tokens = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(3))
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens)
    assert rough.isfinite().all() and (rough.float() - exact).abs().max() < 3e-2 * exact.abs().max()


# ---------------------------------------------------------------------- the start


def test_where_it_starts() -> None:
    """Channel by channel, as it is written down."""
    layers, width, size = 12, 96, 32
    for layer in (0, 4, 11):
        site = Site(width, layers, layer, V, T)
        part, mlp = RWKV7TimeMix(site, size), RWKV7ChannelMix(site)
        for i in (0, 1, 31, 32, 50, 95):
            up, z = 1 - layer / layers, 2 * (i % size) / (size - 1) - 1
            bend, lean = z * abs(z), i / (width - 1) - 0.5
            expected = {
                "decay": -6 + 6 * (i / (width - 1)) ** (1 + (layer / (layers - 1)) ** 0.3) + 0.5 + 2.5 * bend,
                "rate": -0.19 + 0.3 * bend + 0.4 * lean, "removal": 0.71 - 0.1 * lean, "mildness": 1.02,
            }  # fmt: skip
            for name, value in expected.items():
                assert getattr(part, name)[i].item() == pytest.approx(value, abs=1e-5), name
            for share, e in zip(part.mix, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
                assert share[i].item() == pytest.approx(1 - (i / width) ** (e * up), abs=1e-5)
            assert mlp.mix[i].item() == pytest.approx(1 - (i / width) ** up**4, abs=1e-5)
            assert layer == 0 or part.value[i].item() == pytest.approx(0.73 - 0.4 * lean, abs=1e-5)
        assert (part.bonus == -0.04).all() and part.norm.eps == 64e-5
        assert part.norm.weight.detach().unique().item() == pytest.approx(((1 + layer) / layers) ** 0.7)
        for low in (part.to_decay, part.to_rate, part.to_gate):
            assert not low.down.any()
            assert torch.allclose(low.up @ low.up.T, 0.01 * torch.eye(len(low.up)), atol=1e-6)
    assert all(p.isfinite().all() for p in RWKV7TimeMix(Site(D, 1, 0, V, T), 1).parameters())  # one layer, heads of one


def gain(weight: Tensor) -> float:
    """Of an orthogonal map: its singular values, which are all equal."""
    found = torch.linalg.svdvals(weight.detach())
    assert found.max() - found.min() < 1e-4
    return found.mean().item()


@pytest.mark.parametrize("head", [TiedHead, LinearHead])
@pytest.mark.parametrize("vocab", [V, 20])
def test_the_model_starts_as_the_authors_do(head: type, vocab: int) -> None:
    model = small(head=head, vocab_size=vocab)
    for one in model.blocks:
        assert [round(gain(m.weight), 4) for m in one.attention.part.children() if isinstance(m, OrthogonalLinear)] == [
            1, 0.1, 1,
        ]  # fmt: skip
        assert gain(one.mlp.part.up.weight) == pytest.approx(1, abs=1e-4)
        assert not one.attention.part.out.weight.any() and not one.mlp.part.down.weight.any()
    expected = max(1, vocab / D) ** 0.5
    if head is LinearHead:
        assert gain(model.head.linear.weight) == pytest.approx(0.5 * expected, abs=1e-4)
        assert 0.9e-4 < model.embedding.weight.abs().max() <= 1e-4
    else:
        assert gain(model.embedding.weight) == pytest.approx(0.25 * expected, abs=1e-4)
    tokens = torch.randint(vocab, (8, T), generator=torch.Generator().manual_seed(3))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss.item() - math.log(vocab)) < 0.15


def test_it_starts_whatever_a_model_is_made_of() -> None:
    """Stacked maps each, biases at zero, a gain of zero behind a map that does not start at zero."""
    model = tiny(init=RWKV7Init(), block=block(attention=attention(qkv_bias=True), post_norm=RMSNorm))
    for one in model.blocks:
        qkv = one.attention.part.qkv
        assert [round(gain(w), 4) for w in qkv.weight.split(qkv.rows)] == [1, 1, 1] and not qkv.bias.any()
        assert not one.attention.post.weight.any() and one.attention.part.out.weight.any()
    plain = tiny(init=RWKV7Init())
    assert not any(m.weight.any() for b in plain.blocks for m in (b.attention.part.out, b.mlp.part.down))


def test_what_has_no_gradient_at_the_first_steps() -> None:
    """Behind zero maps nothing has one, then all but what stands behind the zero halves of low ranks, then all."""
    model = small()
    tokens = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(3))
    optimizer, zero = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(4):
        optimizer.zero_grad()
        model.objective(tokens[:, :-1], tokens[:, 1:])[0].backward()
        zero.append({name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()})
        optimizer.step()
    # embedding (and head), the norms around the blocks, and what is zero itself
    always = {"embedding.weight", "embedding_norm.weight", "embedding_norm.bias", "norm.weight", "norm.bias"}
    outputs = {f"blocks.{i}.{n}.weight" for i in range(L) for n in ("mlp.part.down", "attention.part.out")}
    assert zero[0] == {name for name, _ in model.named_parameters()} - always - outputs
    halves = {name for name, _ in model.named_parameters() if "to_" in name and name.endswith(".up")}
    assert zero[1] == {name for name in halves if "to_gate" not in name}  # φ(0) = 0 but for the gate's
    assert not zero[2] and not zero[3]


class Two(nn.Module):
    """Both layers, as a stream has them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(shake(goose(at(layer)), 0.1) for layer in range(2))

    def forward(self, x: Tensor) -> Tensor:
        carry = Carry(torch.zeros(x.shape[:2], dtype=torch.int64), x)
        for one in self.blocks:
            x = one(x, carry)
        return x


def test_it_traces_whole() -> None:
    torch._dynamo.reset()
    model, x = Two(), stream(7).float()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(x) - model(x)).abs().max() < 1e-5
    torch._dynamo.reset()


def test_w0_learns_twice_as_fast_in_the_models_optimizer() -> None:
    rates = {group["role"]: group["lr"] for group in small().make_optimizer().param_groups}
    assert rates["timescale"] == 2 * rates["recurrence"] == 2 * rates["matrix"]
