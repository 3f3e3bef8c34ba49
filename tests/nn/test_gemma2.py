"""Soft caps and post-norms equal an independent implementation of Gemma 2: weights copied, logits compared.

Gemma 2 stores a gain as 1 + w, multiplies its embedding by sqrt(D), and calls the post-norm of attention
`post_attention_layernorm`, the norms around the MLP `pre_feedforward_layernorm` and `post_feedforward_layernorm`.
"""

from functools import partial

import pytest
import torch
from helpers import attention, block, shake, tiny
from torch import Tensor, nn

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import GELU
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.norm import RMSNorm

transformers = pytest.importorskip("transformers")

V, T, D, L, F, K = 97, 32, 64, 2, 128, 16
TOLERANCE = 1e-5
SHARPER, LOUDER = 10, 2.5  # so large that a cap is felt, so small that float32 tells the rest


def theirs(softcap: float | None, core_cap: float | None) -> nn.Module:
    config = transformers.Gemma2Config(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=4,
        num_key_value_heads=2, head_dim=K, query_pre_attn_scalar=K, max_position_embeddings=T, sliding_window=10 * T,
        final_logit_softcapping=softcap, attn_logit_softcapping=core_cap, tie_word_embeddings=False, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def ours(softcap: float | None, core_cap: float | None, head: type, post_norm: type | None = RMSNorm) -> BlaGPT:
    """With larger queries and logits, for a cap leaves small numbers alone."""
    core = SDPA if core_cap is None else partial(SoftCapped, cap=core_cap)
    parts = block(
        attention=attention(edits=[RoPE], core=core),
        mlp=partial(GatedMLP, activation=partial(GELU, tanh=True), ratio=F / D),
        post_norm=post_norm,
    )
    model = tiny(
        vocab_size=V, context=T, d_model=D, n_layers=L, block=parts, head=partial(head, softcap=softcap),
        init=GPT2Init(zero_outputs=False),
    )  # fmt: skip
    shake(model)
    with torch.no_grad():
        for layer in model.blocks:
            layer.attention.part.qkv.weight[: 4 * K] *= SHARPER
        model.embedding.weight *= LOUDER
        if head is LinearHead:
            model.head.linear.weight *= LOUDER
    return model.eval()


@torch.no_grad()
def copy(model: BlaGPT, reference: nn.Module) -> None:
    """Write our weights into a Gemma 2."""
    other, h = reference.model, model.blocks[0].attention.part.heads
    other.embed_tokens.weight.copy_(model.embedding.weight / D**0.5)
    reference.lm_head.weight.copy_(model.head.weight if isinstance(model.head, TiedHead) else model.head.linear.weight)
    gains = [(other.norm, model.norm)]
    for mine, layer in zip(model.blocks, other.layers, strict=True):
        part, attend = mine.attention.part, layer.self_attn
        rows = part.qkv.weight.split([h.n * h.dim, h.n_kv * h.dim, h.n_kv * h.dim])
        for projection, weight in zip((attend.q_proj, attend.k_proj, attend.v_proj), rows, strict=True):
            projection.weight.copy_(weight)
        attend.o_proj.weight.copy_(part.out.weight)
        gate, up = mine.mlp.part.gate_up.weight.chunk(2)
        layer.mlp.gate_proj.weight.copy_(gate)
        layer.mlp.up_proj.weight.copy_(up)
        layer.mlp.down_proj.weight.copy_(mine.mlp.part.down.weight)
        gains += [(layer.input_layernorm, mine.attention.norm), (layer.pre_feedforward_layernorm, mine.mlp.norm)]
        gains += [
            (layer.post_attention_layernorm, mine.attention.post),
            (layer.post_feedforward_layernorm, mine.mlp.post),
        ]
    for norm, mine in gains:
        norm.weight.copy_(mine.weight - 1)


@torch.no_grad()
def gap(model: BlaGPT, reference: nn.Module) -> float:
    tokens = torch.randint(V, (3, 29))
    mine = model(tokens)
    assert mine.std() > 0.5
    return (mine - reference(tokens).logits).abs().max().item()


def spoilt(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("head", [TiedHead, LinearHead])
@pytest.mark.parametrize(("softcap", "core_cap"), [(30.0, 50.0), (30.0, None), (None, 50.0), (None, None), (3.0, 1.0)])
def test_gemma2(softcap: float | None, core_cap: float | None, head: type) -> None:
    model, reference = ours(softcap, core_cap, head), theirs(softcap, core_cap)
    copy(model, reference)
    assert gap(model, reference) < TOLERANCE
    for caps in {(None, core_cap), (softcap, None)} - {(softcap, core_cap)}:  # without one of the caps
        without = theirs(*caps)
        without.load_state_dict(reference.state_dict())
        assert gap(model, without) > 100 * TOLERANCE
    spoilt(model.blocks[1].mlp.post.weight)
    assert gap(model, reference) > 100 * TOLERANCE


def test_exchanged_norms_are_noticed() -> None:
    model, reference = ours(30.0, 50.0, LinearHead), theirs(30.0, 50.0)
    copy(model, reference)
    for layer in model.blocks:
        layer.mlp.norm, layer.mlp.post = layer.mlp.post, layer.mlp.norm
    assert gap(model, reference) > 100 * TOLERANCE
