"""Latent attention against transformers and against its absorbed form; low-rank attention against attention."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SITE, D, attention, block, carry_of, copy_mlp_and_norms, heads, qk_norm, shake, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.lab import parts
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.train import BlagptCLI
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.base import Heads, Site, count
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.norm import RMSNorm

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {"n_heads": 4, "kv_rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 8}
latent = partial(LatentAttention, core=SDPA, norm=RMSNorm, **SIZES)
low_rank = partial(LowRankAttention, n_heads=4, n_kv_heads=2, rank=6, edits=[qk_norm, RoPE], core=SDPA)


def absorbed(part: LatentAttention, x: Tensor) -> Tensor:
    """The twin, from the paper's equations (9)-(19), token by token, reading a cache of latents and nothing else.

    The expansion W_kvb is never applied to a key: it is absorbed into the query and into what is read.
    """
    rank, (nope, rope), v_dim = part.latent[0], part.rotary, part.heads.values

    def normed(y: Tensor, gain: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def turned(y: Tensor, t: int) -> Tensor:
        angle = t * part.theta ** (-torch.arange(0, rope, 2, dtype=y.dtype) / rope)
        z = torch.complex(y[: rope // 2], y[rope // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([z.real, z.imag])

    rows = torch.empty_like(x)
    for b in range(len(x)):
        cache_c, cache_k = [], []
        for t, token in enumerate(x[b]):
            c, k = (part.kv_down.weight @ token).split([rank, rope])
            cache_c.append(normed(c, part.kv_norm.weight))
            cache_k.append(turned(k, t))
            if isinstance(part.q, nn.Linear):
                q = part.q.weight @ token
            else:
                q = part.q[2].weight @ normed(part.q[0].weight @ token, part.q[1].weight)
            past_c, past_k = torch.stack(cache_c), torch.stack(cache_k)  # (t + 1, rank), (t + 1, rope)
            read = []
            for i in range(part.heads.n):
                key_up, value_up = part.kv_up.weight.split(nope + v_dim)[i].split([nope, v_dim])
                q_nope, q_rope = q.split(nope + rope)[i].split([nope, rope])
                scores = past_c @ (key_up.T @ q_nope) + past_k @ turned(q_rope, t)
                weights = (scores / (nope + rope) ** 0.5).softmax(0)
                read.append(value_up @ (weights @ past_c))
            rows[b, t] = part.out.weight @ torch.cat(read)
    return rows


@pytest.mark.parametrize("changes", [{}, {"q_rank": 10}, {"v_dim": 10}, {"v_dim": 16, "rope_dim": 6, "theta": 100.0}])
def test_it_equals_its_absorbed_form_reading_latents_alone(changes: dict) -> None:
    part = shake(latent(SITE, **{**SIZES, **changes}).double(), std=0.2)
    x = torch.randn(2, 13, D, dtype=torch.float64)
    mine, twin = part(x, carry_of(x)), absorbed(part, x)
    assert (mine - twin).abs().max() < 1e-6 * mine.abs().max()  # our angles are float32
    part.theta *= 3
    assert (part(x, carry_of(x)) - twin).abs().max() > 1e-4 * mine.abs().max()


# ---------------------------------------------------------------------- transformers


def ours(q_rank: int | None, theta: float, f: int) -> BlaGPT:
    mixer = partial(latent, q_rank=q_rank, theta=theta)
    parts_ = block(attention=mixer, mlp=partial(GatedMLP, activation=SiLU, ratio=f / D))
    return shake(tiny(block=parts_, head=LinearHead)).eval()


@torch.no_grad()
def copy_deepseek(model: BlaGPT, reference: nn.Module, interleaved: bool) -> None:
    """Write our weights into DeepSeek's layout."""

    def neighbours(rows: Tensor) -> Tensor:
        """The rotated rows (..., rope, D), their halves turned into neighbours where the reference pairs those."""
        return torch.stack(rows.chunk(2, dim=-2), dim=-2).flatten(-3, -2) if interleaved else rows

    theirs = reference.model
    theirs.embed_tokens.weight.copy_(model.embedding.weight)
    theirs.norm.weight.copy_(model.norm.weight)
    reference.lm_head.weight.copy_(model.head.linear.weight)
    for mine, layer in zip(model.blocks, theirs.layers, strict=True):
        part, other = mine.attention.part, layer.self_attn
        compressed = isinstance(part.q, nn.Sequential)
        last = part.q[2] if compressed else part.q
        nope, rope = last.weight.unflatten(0, (part.heads.n, -1)).split(
            part.rotary, dim=1
        )  # (H, nope, .), (H, rope, .)
        q_rows = torch.cat([nope, neighbours(rope)], dim=1).flatten(0, 1)
        (other.q_b_proj if compressed else other.q_proj).weight.copy_(q_rows)
        if compressed:
            other.q_a_proj.weight.copy_(part.q[0].weight)
            other.q_a_layernorm.weight.copy_(part.q[1].weight)
        c, k = part.kv_down.weight.split(part.latent)
        other.kv_a_proj_with_mqa.weight.copy_(torch.cat([c, neighbours(k)]))
        other.kv_a_layernorm.weight.copy_(part.kv_norm.weight)
        other.kv_b_proj.weight.copy_(part.kv_up.weight)
        other.o_proj.weight.copy_(part.out.weight)
        copy_mlp_and_norms(mine, layer)


@pytest.mark.parametrize("q_rank", [None, 10])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_whole_model_equals_deepseek(q_rank: int | None, interleaved: bool) -> None:
    transformers = pytest.importorskip("transformers")
    f, theta = 48, 500.0
    config = transformers.DeepseekV3Config(
        vocab_size=61, hidden_size=D, intermediate_size=f, num_hidden_layers=2, first_k_dense_replace=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=12, q_lora_rank=q_rank, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=32, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_interleave=interleaved, rope_parameters={"rope_type": "default", "rope_theta": theta},
        attention_bias=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model, reference = ours(q_rank, theta, f), transformers.DeepseekV3ForCausalLM(config).eval()
    assert count(model.parameters()) == count(reference.parameters())
    copy_deepseek(model, reference, interleaved)
    tokens = torch.randint(61, (3, 29))
    theirs = reference(tokens).logits

    def gap() -> float:
        return (model(tokens) - theirs).abs().max().item()

    with torch.no_grad():
        assert theirs.std() > 0.1
        assert gap() < 1e-5
        for name, p in model.blocks[1].attention.part.named_parameters():
            kept = p.clone()
            p.add_(0.2 * torch.randn_like(p))
            assert gap() > 1e-3, f"{name} can be anything"
            p.copy_(kept)
        copy_deepseek(model, reference, not interleaved)
        theirs = reference(tokens).logits
        assert gap() > 1e-3  # the layout of the pairs is noticed


# ---------------------------------------------------------------------- shapes, counts, kernels


@pytest.mark.parametrize("q_rank", [None, 10])
def test_parameters_are_the_closed_formula(q_rank: int | None) -> None:
    h, kv, nope, rope, v = SIZES.values()
    q = D * h * (nope + rope) if q_rank is None else D * q_rank + q_rank + q_rank * h * (nope + rope)
    expected = q + D * (kv + rope) + kv + kv * h * (nope + v) + h * v * D
    assert count(latent(SITE, q_rank=q_rank).parameters()) == expected


def test_only_rope_numbers_rotate_and_all_heads_share_the_key_that_does() -> None:
    part = shake(latent(SITE), std=0.2)
    x = torch.randn(1, 1, D).expand(2, 13, D)  # the same token everywhere: without rotation all positions are equal
    q, k, v = part.project(x)
    assert (q.shape, k.shape, v.shape) == ((2, 4, 13, 10), (2, 4, 13, 10), (2, 4, 13, 8))
    for y in (q[..., :6], k[..., :6], v):
        assert (y - y[:, :, :1]).abs().max() < 1e-6
    for y in (q[..., 6:], k[..., 6:]):
        assert (y[:, :, 1:] - y[:, :, :1]).abs().amax(-1).min() > 1e-3
    assert torch.equal(k[..., 6:], k[:, :1, :, 6:].expand(-1, 4, -1, -1))
    with torch.no_grad():
        part.kv_norm.weight.zero_()  # the latent is gone, the rotating key is not
    _, other, gone = part.project(x)
    assert torch.equal(other[..., 6:], k[..., 6:])
    assert not other[..., :6].any()
    assert not gone.any()


def test_sdpa_reads_values_of_another_width_and_counts_them() -> None:
    q, k, v = torch.randn(2, 2, 4, 13, 8).unbind(0) + (torch.randn(2, 4, 13, 5),)
    told = Heads(SITE, 4, 4, 8, v_dim=5)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf)
    assert (SDPA(told)(q, k, v) - scores.softmax(-1) @ v).abs().max() < 1e-6
    assert SDPA(told).flops_per_token(100) == 100 * 4 * 8 + 100 * 4 * 5
    assert SDPA(heads(4, 2, 8)).flops_per_token(100) == 2 * 100 * 4 * 8
    assert (heads(4, 2, 8).values, told.values) == (8, 5)


def test_equal_widths_reach_a_fused_kernel() -> None:
    """The overlay's choice: with values as wide as keys no T × T matrix is made, not even on CPU."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    part, x = latent(SITE, v_dim=SIZES["nope_dim"] + SIZES["rope_dim"]), torch.randn(2, 13, D)
    with Names():
        part(x, carry_of(x)).sum().backward()
    assert [name for name in seen if "flash_attention" in name and "backward" in name]
    assert not [name for name in seen if "softmax" in name]


@pytest.mark.parametrize("part", [latent, partial(latent, q_rank=10), low_rank])
def test_it_compiles_without_a_break(part: partial) -> None:
    mixer, x = shake(part(SITE)), torch.randn(2, 13, D)
    compiled = torch.compile(mixer, backend="eager", fullgraph=True, dynamic=False)
    assert (compiled(x, carry_of(x)) - mixer(x, carry_of(x))).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (latent, {"rope_dim": 3}, "layer 0: RoPE pairs numbers, so rope_dim=3 must be even, such as 4"),
        (latent, {"rope_dim": 0}, r"rope_dim=0 \(expected 1 or more\)"),
        (latent, {"nope_dim": 0}, "nope_dim=0"),
        (latent, {"v_dim": -1}, "v_dim=-1"),
        (latent, {"n_heads": 0}, "n_heads=0"),
        (latent, {"kv_rank": 0}, "kv_rank=0"),
        (latent, {"q_rank": 0}, "q_rank=0"),
        (latent, {"core": None}, "attention.core: empty"),
        (latent, {"norm": None}, "attention.norm: empty"),
        (low_rank, {"rank": 0}, r"layer 0: rank=0 \(expected 1 or more\)"),
        (low_rank, {"n_kv_heads": 3}, r"n_kv_heads=3; choose of \[1, 2, 4\]"),
        (low_rank, {"core": None}, "attention.core: empty"),
    ],
)
def test_a_mistake_is_told_when_building(part: partial, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        part(SITE, **changes)


# ---------------------------------------------------------------------- low rank


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n_kv", "head_dim", "rank"), [(2, None, 6), (4, None, 1), (1, 6, 40)])
def test_low_rank_is_attention_whose_keys_and_values_are_a_product(
    bias: bool, n_kv: int, head_dim: int | None, rank: int
) -> None:
    changes = {"n_kv_heads": n_kv, "head_dim": head_dim, "qkv_bias": bias, "out_bias": bias}
    part, plain = shake(low_rank(SITE, rank=rank, **changes)), attention(**changes)(SITE)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([part.q.weight, part.kv_up.weight @ part.kv_down.weight]))
        if bias:
            plain.qkv.bias.copy_(torch.cat([part.q.bias, part.kv_up.bias]))
    plain.out.load_state_dict(part.out.state_dict())
    plain.edits.load_state_dict(part.edits.state_dict())
    x = torch.randn(2, 13, D)
    y = part(x, carry_of(x))
    assert (y - plain(x, carry_of(x))).abs().max() < 1e-5 * y.abs().max()
    with torch.no_grad():
        plain.qkv.weight[-1].add_(0.1)
    assert (y - plain(x, carry_of(x))).abs().max() > 1e-3 * y.abs().max()


# ---------------------------------------------------------------------- at the baseline's size


def configured(*overlays: str) -> BlaGPT:
    """The baseline under overlays, without memory."""
    parts.import_all()
    words = ["--config", str(CONFIGS / "blagpt.yaml")]
    for name in overlays:
        words += ["--config", str(CONFIGS / "techniques" / f"{name}.yaml")]
    tree = from_arguments(words).tree
    for key in ("callbacks", "precision"):
        tree["trainer"].pop(key, None)
    with torch.device("meta"):
        return BlagptCLI("fit", tree, run=False).model


@pytest.mark.parametrize(
    ("overlay", "parameters", "flops"),
    [("mla", 142_546_944, 911_278_080), ("mla_lowrank", 140_801_280, 900_661_248)],
)
def test_the_overlay_is_what_its_page_says(overlay: str, parameters: int, flops: int) -> None:
    model, baseline = configured(overlay), configured()
    assert count(model.parameters()) == parameters
    assert model.flops_per_token() == flops
    page = (CONFIGS.parent / "docs" / "techniques" / f"{overlay}.md").read_text()
    assert f"{parameters:,}" in page
    assert f"{flops:,}" in page
    if overlay == "mla_lowrank":  # all but the latent is the baseline's, biases and edits included
        mine, theirs = model.blocks[0].attention.part, baseline.blocks[0].attention.part
        assert (mine.heads.n, mine.heads.n_kv, mine.heads.dim) == (theirs.heads.n, theirs.heads.n_kv, theirs.heads.dim)
        assert repr(mine.edits) == repr(theirs.edits)
        assert repr(mine.core) == repr(theirs.core)
        assert (mine.q.bias is None, mine.out.bias is None) == (theirs.qkv.bias is None, theirs.out.bias is None)


def test_bf16_is_close_to_float32() -> None:
    for build in (latent, partial(latent, q_rank=10), low_rank):
        part = shake(build(Site(D, 2, 0, 61, 32)), std=0.2)
        x = torch.randn(2, 23, D)
        exact = part(x, carry_of(x))
        y = part.bfloat16()(x.bfloat16(), carry_of(x))
        assert y.dtype == torch.bfloat16
        assert (y.float() - exact).abs().max() < 5e-2 * exact.abs().max()
