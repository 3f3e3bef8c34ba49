"""The backbone equals independent implementations: weights copied, logits compared.

Each reference has parts that ours takes from its sockets: Llama (grouped queries, RoPE by halves, SwiGLU), Qwen2 (bias on
q, k, v), Qwen3 (QK-norm before RoPE, a head width of its own), GPT-2 (LayerNorm, learned positions, tanh GELU, biases).
"""

from functools import partial

import pytest
import torch
from helpers import attention, block, copy_mlp_and_norms, shake, tiny, tiny_gpt2
from torch import Tensor, nn

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.edit_qk_norm import QKNorm
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.norm import RMSNorm

transformers = pytest.importorskip("transformers")

V, T, D, L, F, EPS = 97, 32, 64, 2, 128, 1e-6
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": T, "rms_norm_eps": EPS,
}  # fmt: skip


def rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def ours(edits: list, head: type = LinearHead, **attention_changes: object) -> BlaGPT:
    norm = partial(RMSNorm, eps=EPS)
    parts = block(
        norm=norm,
        attention=attention(edits=edits, **attention_changes),
        mlp=partial(GatedMLP, activation=SiLU, ratio=F / D),
    )
    return shake(tiny(vocab_size=V, context=T, d_model=D, n_layers=L, block=parts, norm=norm, head=head)).eval()


@torch.no_grad()
def copy_llama(model: BlaGPT, reference: nn.Module) -> None:
    """Write our weights into a model of the Llama family."""
    theirs = reference.model
    theirs.embed_tokens.weight.copy_(model.embedding.weight)
    theirs.norm.weight.copy_(model.norm.weight)
    reference.lm_head.weight.copy_(model.head.weight if isinstance(model.head, TiedHead) else model.head.linear.weight)
    for mine, layer in zip(model.blocks, theirs.layers, strict=True):
        part, other, h = mine.attention.part, layer.self_attn, mine.attention.part.heads
        rows = [h.n * h.dim, h.n_kv * h.dim, h.n_kv * h.dim]  # all queries, then all keys, then all values
        projections = (other.q_proj, other.k_proj, other.v_proj)
        for projection, weight in zip(projections, part.qkv.weight.split(rows), strict=True):
            projection.weight.copy_(weight)
        if part.qkv.bias is not None:
            for projection, bias in zip(projections, part.qkv.bias.split(rows), strict=True):
                projection.bias.copy_(bias)
        other.o_proj.weight.copy_(part.out.weight)
        for edit in part.edits:
            if isinstance(edit, QKNorm):
                other.q_norm.weight.copy_(edit.q.weight)
                other.k_norm.weight.copy_(edit.k.weight)
        copy_mlp_and_norms(mine, layer)


@torch.no_grad()
def gap(model: BlaGPT, reference: nn.Module) -> float:
    """Largest difference of logits; both must be far from constant for it to mean anything."""
    tokens = torch.randint(V, (3, 29))
    mine, theirs = model(tokens), reference.eval()(tokens).logits
    assert mine.std() > 0.1
    return (mine - theirs).abs().max().item()


def spoilt(model: BlaGPT, parameter: Tensor) -> None:
    """Move one tensor of ours, so that the comparison must notice."""
    with torch.no_grad():
        parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize(("n_kv", "head"), [(2, LinearHead), (1, LinearHead), (4, TiedHead)])
def test_llama(theta: float, n_kv: int, head: type) -> None:
    config = transformers.LlamaConfig(
        **{**SIZES, "num_key_value_heads": n_kv}, **rope(theta), tie_word_embeddings=head is TiedHead
    )
    model, reference = ours([partial(RoPE, theta=theta)], head, n_kv_heads=n_kv), transformers.LlamaForCausalLM(config)
    copy_llama(model, reference)
    assert gap(model, reference) < TOLERANCE
    spoilt(model, model.blocks[1].attention.part.qkv.weight)
    assert gap(model, reference) > 100 * TOLERANCE


def test_a_wrong_theta_is_noticed() -> None:
    model = ours([partial(RoPE, theta=1e4)])
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **rope(1e6)))
    copy_llama(model, reference)
    assert gap(model, reference) > 10 * TOLERANCE


def test_qwen2() -> None:
    config = transformers.Qwen2Config(**SIZES, **rope(1e6), tie_word_embeddings=False)
    model, reference = ours([partial(RoPE, theta=1e6)], qkv_bias=True), transformers.Qwen2ForCausalLM(config)
    copy_llama(model, reference)
    assert gap(model, reference) < TOLERANCE
    spoilt(model, model.blocks[0].attention.part.qkv.bias)
    assert gap(model, reference) > 100 * TOLERANCE


@pytest.mark.parametrize("head_dim", [16, 24])
def test_qwen3(head_dim: int) -> None:
    config = transformers.Qwen3Config(**SIZES, **rope(1e6), head_dim=head_dim, tie_word_embeddings=False)
    edits = [partial(QKNorm, norm=partial(RMSNorm, eps=EPS)), partial(RoPE, theta=1e6)]
    model, reference = ours(edits, head_dim=head_dim), transformers.Qwen3ForCausalLM(config)
    copy_llama(model, reference)
    assert gap(model, reference) < TOLERANCE
    spoilt(model, model.blocks[0].attention.part.edits[0].q.weight)
    assert gap(model, reference) > 100 * TOLERANCE


def test_gpt2() -> None:
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=L, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = shake(tiny_gpt2(vocab_size=V, context=T, d_model=D, n_layers=L)).eval()
    reference = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        theirs = reference.transformer
        theirs.wte.weight.copy_(model.embedding.weight)
        theirs.wpe.weight.copy_(model.positions.table.weight)
        theirs.ln_f.load_state_dict(model.norm.state_dict())
        for mine, layer in zip(model.blocks, theirs.h, strict=True):
            layer.ln_1.load_state_dict(mine.attention.norm.state_dict())
            layer.ln_2.load_state_dict(mine.mlp.norm.state_dict())
            pairs = [
                (mine.attention.part.qkv, layer.attn.c_attn),
                (mine.attention.part.out, layer.attn.c_proj),
                (mine.mlp.part.up, layer.mlp.c_fc),
                (mine.mlp.part.down, layer.mlp.c_proj),
            ]
            for linear, conv in pairs:  # GPT-2 stores (in, out)
                conv.weight.copy_(linear.weight.T)
                conv.bias.copy_(linear.bias)
    assert gap(model, reference) < TOLERANCE
    spoilt(model, model.positions.table.weight)
    assert gap(model, reference) > 100 * TOLERANCE
