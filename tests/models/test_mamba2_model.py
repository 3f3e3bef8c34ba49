"""The Mamba-2 model: Hugging Face's with our weights, its size by formula, and a memory that does not grow with the text."""

from functools import partial

import pytest
import torch
from helpers import shake, tiny
from shipped import MODELS, built
from torch import nn

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import count
from blagpt_pl.nn.block import SoloBlock
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.states import States

V, T, D, L, N, P, EPS = 97, 32, 64, 2, 16, 16, 1e-5
norm = partial(RMSNorm, eps=EPS)


def ours(head: type = TiedHead, **changes: object) -> BlaGPT:
    mixer = partial(Mamba2, d_state=N, head_dim=P, chunk=8, **changes)
    parts = partial(SoloBlock, norm=norm, part=mixer)
    return shake(tiny(vocab_size=V, context=T, d_model=D, n_layers=L, block=parts, norm=norm, head=head)).eval()


@torch.no_grad()
def theirs(model: BlaGPT, groups: int) -> nn.Module:
    """Hugging Face's model with our weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=L, state_size=N, head_dim=P, num_heads=2 * D // P, chunk_size=7,
        n_groups=groups, tie_word_embeddings=isinstance(model.head, TiedHead), layer_norm_epsilon=EPS,
    )  # fmt: skip
    other = transformers.Mamba2ForCausalLM(config).eval()
    other.backbone.embeddings.weight.copy_(model.embedding.weight)
    other.backbone.norm_f.weight.copy_(model.norm.weight)
    if isinstance(model.head, LinearHead):
        other.lm_head.weight.copy_(model.head.linear.weight)
    for mine, layer in zip(model.blocks, other.backbone.layers, strict=True):
        part, mixer = mine.branch.part, layer.mixer
        layer.norm.weight.copy_(mine.branch.norm.weight)
        mixer.in_proj.weight.copy_(part.proj.weight)
        mixer.conv1d.weight.copy_(part.conv.weight[:, None])
        mixer.conv1d.bias.copy_(part.conv.bias)
        mixer.norm.weight.copy_(part.norm.weight)
        mixer.out_proj.weight.copy_(part.out.weight)
        for name in ("A_log", "dt_bias", "D"):
            getattr(mixer, name).copy_(getattr(part, name))
    return other


@pytest.mark.parametrize(("head", "groups"), [(TiedHead, 1), (LinearHead, 2)])
@torch.no_grad()
def test_it_is_hugging_faces(head: type, groups: int) -> None:
    model = ours(head, n_groups=groups)
    other, tokens = theirs(model, groups), torch.randint(V, (3, 29))
    logits = model(tokens)
    assert logits.std() > 0.1 and (logits - other(tokens).logits).abs().max() < 1e-5
    assert count(model.parameters()) == count(other.parameters())
    model.blocks[0].branch.part.conv.weight.mul_(1.1)
    assert (model(tokens) - logits).abs().max() > 1e-4


@torch.no_grad()
def test_it_generates_as_hugging_faces_does_and_beyond_its_context() -> None:
    model, prompt = ours(), torch.randint(V, (2, 5))
    other = theirs(model, 1)
    found = model.generate(prompt, 40, temperature=0)  # 45 tokens, of which the context holds 32
    options = {"do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(found, other.generate(prompt, max_new_tokens=40, **options))


@torch.no_grad()
def test_pieces_are_the_whole_and_the_state_does_not_grow() -> None:
    model, tokens, states = ours(), torch.randint(V, (2, 31)), States()
    whole, sizes = model(tokens), set()
    for piece in tokens.split([1, 9, 8, 13], dim=1):
        x, carry = model.trunk(piece, states)
        logits = model.head(model.finish(x, carry))
        end = states.start + piece.shape[1]
        assert (logits - whole[:, states.start : end]).abs().max() < 1e-5
        assert not states.grows
        sizes.add(sum(t.numel() for left in states._left for t in left))
        states = states.after(piece.shape[1])
    assert sizes == {L * 2 * (3 * (2 * D + 2 * N) + 2 * D * N)}  # the last three inputs of the convolution, and S


def test_its_size_and_cost_by_formula() -> None:
    full = built("blagpt.yaml", "--config", str(MODELS["mamba2"])).model
    v, d, layers, n, p, k, chunk = 50304, 768, 24, 128, 64, 4, 64
    inner, heads = 2 * d, 24
    one = d * (2 * inner + 2 * n + heads) + (inner + 2 * n) * (k + 1) + 3 * heads + inner + inner * d + d
    assert count(full.parameters()) == v * d + layers * one + d == 129_001_920
    recurrence = heads * (2 * chunk * p + 4 * p * n) + 2 * chunk * n
    maps = 2 * d * (2 * inner + 2 * n + heads) + 2 * inner * d
    flops = count_flops(full, full.context)
    assert flops.forward_per_token == layers * (maps + recurrence) + 2 * v * d
    assert flops.backward_per_token == 2 * flops.forward_per_token and not flops.uncounted
