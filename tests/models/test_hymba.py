"""Hymba: equal to its layers written out position by position, causal, and its size, cost and pieces."""

import math
from dataclasses import asdict
from functools import partial

import pytest
import torch
from helpers import SITE, D, T, V, adamw, carry_of, gated, shake
from naive_selective_scan import scan
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.hymba import Hymba
from blagpt_pl.nn.attention import core_meta
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_meta import MetaWindowed, banded, flex
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_rope import angles
from blagpt_pl.nn.base import Carry, Heads, count
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.memory import RecomputeBlocks
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.recurrent import parallel_heads
from blagpt_pl.nn.recurrent.parallel_heads import HybridSite, HymbaMixer
from blagpt_pl.nn.roles import blocks_of
from blagpt_pl.nn.states import States
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing import check_model
from blagpt_pl.testing.promises import check_causal, influence

H, G, N, M, W, ORDER = 4, 2, 3, 5, 4, "gllg"
KEPT = ("causality", "responsiveness", "batch", "objective", "generate", "state dict", "gradients")
mixer = partial(HymbaMixer, n_heads=H, n_kv_heads=G, core=SDPA, norm=RMSNorm, window=W, d_state=N)


def small(attention: object = mixer, **changes: object) -> Hymba:
    """Four layers, of which the inner two are local and share keys and values; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "order": ORDER, "n_meta": M,
        "block": partial(Block, norm=RMSNorm, attention=attention, mlp=gated), "norm": RMSNorm, "head": TiedHead,
        "init": GPT2Init(zero_outputs=True), "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return Hymba(**{**arguments, **changes})


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


# ---------------------------------------------------------------------- written out


def turned(x: Tensor, t: int, theta: float | None) -> Tensor:
    """RoPE of one head (B, K) at position t."""
    if theta is None:
        return x
    angle = angles(128, x.shape[-1], theta, x.device)[t]  # the house's table, in float32
    a, b = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def naive_mixer(part: HymbaMixer, x: Tensor, is_global: bool, window: int, lent: list | None) -> tuple[Tensor, list]:
    """(B, M + T, D) -> the same shape, and keys and values by position and head; those lent by the layer before, if any."""
    k_dim, v_dim, inner, length = D // H, 2 * D // H, 2 * D, x.shape[1]
    rows = [D, *([] if lent else [G * k_dim, G * v_dim]), inner, inner]
    q, *kv, u, z = (x @ part.proj.weight.T).split(rows, dim=-1)
    if lent is None:
        keys = [
            [turned(kv[0][:, t, g * k_dim : (g + 1) * k_dim], t, part.theta) for g in range(G)] for t in range(length)
        ]
        values = [[kv[1][:, t, g * v_dim : (g + 1) * v_dim] for g in range(G)] for t in range(length)]
    else:
        keys, values = lent
    attended = []
    for t in range(length):
        seen = [s for s in range(t + 1) if is_global or t - s < window or s < M]
        heads = []
        for h in range(H):
            mine = turned(q[:, t, h * k_dim : (h + 1) * k_dim], t, part.theta)
            scores = torch.stack([(mine * keys[s][h // (H // G)]).sum(-1) / math.sqrt(k_dim) for s in seen], dim=1)
            p = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append(sum(p[:, i, None] * values[s][h // (H // G)] for i, s in enumerate(seen)))
        attended.append(torch.cat(heads, dim=-1))
    ssm = part.ssm
    taps = [F.pad(u, (0, 0, 3 - i, 0))[:, :length] * ssm.conv.weight[:, i] for i in range(4)]
    u = F.silu(sum(taps) + ssm.conv.bias)
    raw = (u @ ssm.proj.weight.T).split([D // 16, N, N], dim=-1)
    dt, b, c = (rms(t, norm.weight) for t, norm in zip(raw, ssm.norms, strict=True))
    dt = torch.log1p((dt @ ssm.dt_weight.T + ssm.dt_bias).exp())
    y, _ = scan(u, dt, -ssm.A_log.exp(), b, c)
    recurred = (y + ssm.D * u) * F.silu(z)
    mean = (rms(torch.stack(attended, dim=1), part.attention_norm.weight) + rms(recurred, part.ssm_norm.weight)) / 2
    return mean @ part.out.weight.T, [keys, values]


def naive(model: Hymba, tokens: Tensor, order: str = ORDER, window: int = W) -> Tensor:
    """(B, T) -> logits (B, T, V)."""
    x = torch.cat((model.meta.weight[None].expand(len(tokens), -1, -1), model.embedding.weight[tokens]), dim=1)
    own, run = [], 0
    for block, letter in zip(model.blocks, order, strict=True):
        run = run + 1 if letter == "l" else 0
        mixer, mlp = block.attention, block.mlp
        lent = own if letter == "l" and run % 2 == 0 else None
        y, own = naive_mixer(mixer.part, rms(x, mixer.norm.weight), letter == "g", window, lent)
        x = x + y
        gate, up = (rms(x, mlp.norm.weight) @ mlp.part.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ mlp.part.down.weight.T
    x = rms(x[:, M:], model.norm.weight)
    if model.token_bias is not None:
        x = x + model.token_bias.weight[tokens]
    return x @ model.embedding.weight.T


def largest_gap(model: Hymba, length: int, gradients: bool = True, **facts: object) -> float:
    """Between the model and its layers written out: of the logits, and of every parameter's gradient."""
    shake(model, 0.2).double()
    tokens, found = tokens_of(length), []
    weights = torch.randn(2, length, V, dtype=torch.float64)
    for y in (model(tokens), naive(model, tokens, **facts)):
        by = torch.autograd.grad((y * weights).mean(), [*model.parameters()]) if gradients else ()
        found.append([y, *by])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("length", "order", "changes"),
    [
        (1, "gllg", {}),
        (13, "gllg", {}),
        (11, "lllg", {"token_bias": True}),
        (9, "lgl", {"attention": partial(mixer, theta=None)}),
        (7, "llg", {"attention": partial(mixer, window=9)}),
    ],
)
def test_it_is_its_layers_written_out(length: int, order: str, changes: dict) -> None:
    window = 9 if length == 7 else W
    assert largest_gap(small(order=order, **changes), length, order=order, window=window) < 1e-10


@pytest.mark.parametrize("window", [W - 1, W + 1])
def test_a_window_that_is_one_off_is_noticed(window: int) -> None:
    assert largest_gap(small(), 13, gradients=False, window=window) > 1e-3


def test_another_order_is_noticed() -> None:
    assert largest_gap(small(order="lgg"), 13, gradients=False, order="ggg") > 1e-3


@pytest.mark.parametrize("start", [-M, 1])
def test_positions_that_do_not_count_the_meta_tokens_alike_are_noticed(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text at positions of its own, 0 ... T - 1; queries one place after their keys."""

    def moved(self: HymbaMixer, x: Tensor, carry: Carry) -> Tensor:
        at = torch.arange(x.shape[2], dtype=torch.float32)
        at = torch.where(at < M, at, at - M) if start < 0 else at + (x.shape[1] == H)
        angle = at[:, None] * angles(2, x.shape[3], self.theta, x.device)[1]
        return parallel_heads.rotate(x, angle)

    monkeypatch.setattr(HymbaMixer, "rotated", moved)
    assert largest_gap(small(), 13, gradients=False) > 1e-3


def test_shared_keys_that_are_not_rotated_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unrotated(dict):
        def __setitem__(self, name: str, value: Tensor) -> None:
            if name == parallel_heads.KEYS:
                value = parallel_heads.rotate(value, -angles(value.shape[2], value.shape[3], 1e4, value.device))
            super().__setitem__(name, value)

    whole = Carry.__init__

    def made(self: Carry, tokens: Tensor, x0: Tensor, memo: dict | None = None, states: States | None = None) -> None:
        whole(self, tokens, x0, Unrotated() if memo is None else memo, states)

    monkeypatch.setattr(Carry, "__init__", made)
    assert largest_gap(small(), 13, gradients=False) > 1e-3


def test_a_gate_that_is_missing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parallel_heads.SelectiveSSM.forward

    def ungated(self: nn.Module, u: Tensor, z: Tensor, past: tuple | None = None) -> tuple:
        return whole(self, u, torch.ones_like(z), past)

    monkeypatch.setattr(parallel_heads.SelectiveSSM, "forward", ungated)
    assert largest_gap(small(), 13, gradients=False) > 1e-3


# ---------------------------------------------------------------------- its promises


def test_pairs_follow_the_order() -> None:
    facts = {**asdict(SITE), "order": "glllllgllllg", "meta": M}
    sites = [HybridSite(**{**facts, "layer": i}) for i in range(12)]
    assert [i for i, site in enumerate(sites) if site.lends] == [1, 3, 7, 9]
    assert [i for i, site in enumerate(sites) if site.borrows] == [2, 4, 8, 10]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("length", [5, 13])
def test_causality(length: int, training: bool) -> None:
    model = shake(small(), 0.1).double().train(training)
    one, other = tokens_of(length)
    moved = influence(model, one, torch.where(one == other, (one + 1) % V, other), training)
    check_causal(moved, "hymba")
    assert moved.diagonal().min() > 1e-6


def test_promises() -> None:
    """Those that an addition could break; all others are examined with the shipped configuration by `blagpt check`."""
    made = small(order="lllg", token_bias=True, dropout=0.1, losses=[ZLoss, partial(MultiToken, n=3)])
    verdicts = check_model(made, only=KEPT)
    assert all(v.state == "kept" for v in verdicts) and len(verdicts) == len(KEPT)


@pytest.mark.parametrize("edges", [[1], [3, 4, 15], list(range(1, 23))])
def test_pieces_are_the_whole(edges: list[int]) -> None:
    """Meta tokens enter with the first piece; a local layer keeps them and its window, whatever came before."""
    model, tokens = shake(small(order="lllg"), 0.2).double().eval(), tokens_of(23)
    found, states = [], States()
    assert model.can_continue()
    for piece in tokens.tensor_split(edges, dim=1):
        features = model.finish(*model.trunk(piece, states))
        assert features.shape[:2] == piece.shape
        found.append(model.head(features))
        local = states._left[0]
        states = states.after(piece.shape[1])
        assert local[0].shape[2] == min(M + W - 1, M + states.start)
    assert states.grows
    assert (torch.cat(found, dim=1) - model(tokens)).abs().max() < 1e-12


def test_recomputed_blocks_share_keys_too() -> None:
    found, tokens = [], tokens_of(13)
    for memory in (None, RecomputeBlocks()):
        torch.manual_seed(0)
        model = shake(small(memory=memory), 0.2)
        model.apply_memory_policy()
        loss, _ = model.objective(tokens[:, :-1], tokens[:, 1:])
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()])])
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-6


def test_parameters_and_flops() -> None:
    d, r, k, v = 2 * D, D // 16, D // H, 2 * D // H
    ssm = 5 * d + d * (r + 2 * N) + r * d + d + d * N + d + r + 2 * N
    own = D * (D + G * (k + v) + 2 * d) + d * D + 2 * d + ssm
    blocks = 4 * (own + 3 * D * 2 * D + 2 * D) - D * G * (k + v)
    model = small()
    assert count(model.parameters()) == V * D + M * D + blocks + D
    flops, length = count_flops(model, T), M + T
    pairs = sum(t - s < W or s < M for t in range(length) for s in range(t + 1))
    local = 2 * H * (k + v) * pairs // length * length
    maps = 4 * (D * (D + G * (k + v) + 2 * d) + d * D + 3 * D * 2 * D + d * (2 * r + 2 * N)) - D * G * (k + v)
    whole = model.blocks[0].attention.part.core.flops_per_token(length) * length
    assert not flops.uncounted
    assert flops.forward_per_token == -(-(2 * maps * length + 2 * local + 2 * whole + 2 * D * V * T) // T)


# ---------------------------------------------------------------------- the core of local layers


def read_one_by_one(q: Tensor, k: Tensor, v: Tensor, window: int, always: int) -> Tensor:
    rows = []
    for t in range(q.shape[2]):
        seen = [s for s in range(t + 1) if t - s < window or s < always]
        kk, vv = (x[:, :, seen].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        p = ((q[:, :, t, None] * kk).sum(-1) / math.sqrt(q.shape[3])).softmax(-1)
        rows.append((p[..., None] * vv).sum(2))
    return torch.stack(rows, dim=2)


def heads_at(length: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, n, length, w, dtype=dtype).requires_grad_() for n, w in ((4, 8), (2, 8), (2, 5))]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("length", [1, 6, 7, 12, 23, 31])
@pytest.mark.parametrize(("window", "always"), [(6, 3), (3, 8), (2, 1), (5, 20)])
def test_the_core_equals_a_loop(length: int, window: int, always: int) -> None:
    inputs = heads_at(length)
    core = MetaWindowed(Heads(SITE, 4, 2, 8, 5), window, always)
    expected = read_one_by_one(*inputs, window, always)
    weights, found = torch.randn_like(expected), []
    for y in (core(*inputs), expected):
        found.append([y, *torch.autograd.grad(y, inputs, weights)])
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-11
    plain = [t.detach() for t in inputs]
    assert (flex(*plain, window, always) - expected).abs().max() < 1e-11
    for last in range(1, length):
        assert (core(plain[0][:, :, -last:], *plain[1:]) - expected[:, :, -last:]).abs().max() < 1e-11


def test_the_core_keeps_nothing_quadratic_and_counts_its_pairs() -> None:
    site = HybridSite(**{**asdict(SITE), "context": 1024}, order="l", meta=8)
    core, sizes = MetaWindowed(Heads(site, 4, 2, 8, 5), 16, 8), []
    for length in (256, 1024):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):  # noqa: B023
            banded(*heads_at(length), 16, 8)
        sizes.append(max(kept))
    assert sizes[1] < 4.6 * sizes[0]
    for length in (1, 7, 16, 20, 24, 25, 60):
        pairs = sum(t - s < 16 or s < 8 for t in range(length) for s in range(t + 1))
        assert core.flops_per_token(length) == 2 * 4 * (8 + 5) * pairs // length
    assert core.kernel(torch.device("cpu"), torch.float32, 64) == "chunks of the window"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: small(order="gxg"), r"model\.order: 'gxg'"),
        (lambda: small(order="ll"), r"model\.order: 'll'.*one g at least"),
        (lambda: small(n_meta=0), r"model\.n_meta: 0"),
        (lambda: small(order="gg"), r"layer 0: HymbaMixer\.window: 4, and model\.order is 'gg'"),
        (lambda: small(partial(mixer, window=None)), r"layer 0: HymbaMixer\.window: None"),
        (lambda: small(partial(mixer, window=40)), r"layer 1: window: 40 and the first 5 leave nothing out of 37"),
        (lambda: small(partial(mixer, window=1)), r"layer 1: window: 1 "),
        (lambda: small(partial(mixer, theta=-1.0)), r"layer 0: HymbaMixer\.theta: -1\.0"),
        (lambda: small(partial(mixer, n_heads=32, n_kv_heads=1)), r"n_heads: RoPE pairs numbers"),
        (lambda: small(partial(mixer, d_state=0)), r"layer 0: HymbaMixer\.d_state: 0"),
        (lambda: small(partial(Attention, n_heads=4, core=SDPA)), r"model\.block: no HymbaMixer in layer 0"),
        (lambda: mixer(SITE), r"fix: model\.class_path: Hymba"),
        (lambda: MetaWindowed(Heads(SITE, 4, 2, 8), 4, 0), r"layer 0: always: 0"),
    ],
)  # fmt: skip
def test_what_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_parts_are_told_of_the_meta_tokens() -> None:
    class Told(Block):
        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            seen.append((x.shape, carry.tokens, carry.x0.shape))
            return super().forward(x, carry)

    seen: list = []
    model = small(block=partial(Told, norm=RMSNorm, attention=mixer, mlp=gated))
    tokens = tokens_of(9)
    model(tokens)
    for shape, beside, entered in seen:
        assert shape == entered == (2, M + 9, D)
        assert not beside[:, :M].any() and beside[:, M:].equal(tokens)
    assert model.blocks[1].attention.part.core.heads.site.context == M + T
    assert model.meta.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.parameter_roles()["meta.weight"] == "embedding"


def test_the_twin_is_used_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And flex_attention, with the same arguments, where there is one."""
    calls = []
    monkeypatch.setattr(
        core_meta, "fused_or", lambda form, twin, q, k, v, *sizes: calls.append((form, twin, sizes)) or v
    )
    MetaWindowed(Heads(SITE, 4, 2, 8), 6, 3)(*heads_at(7))
    assert calls == [(flex, banded, (6, 3))]
    assert carry_of(torch.zeros(1, 1, D)).start == 0


def test_rows_of_queries_and_keys_act_as_heads() -> None:
    blocks, k = blocks_of(small()), D // H
    q, kv, inner = (D, k), [(G * k, k), (G * 2 * k, 1)], (2 * D, 1)
    assert blocks["blocks.0.attention.part.proj.weight"] == (q, *kv, inner, inner)
    assert blocks["blocks.2.attention.part.proj.weight"] == (q, inner, inner)  # borrows
