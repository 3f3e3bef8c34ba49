"""Tiny models that the tests share."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import GELU, SiLU
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_qk_norm import QKNorm
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import Carry, Heads, Site
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import MLP, GatedMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing.certificate import PROMISES, check_model

V, T, D, L = 61, 32, 32, 2
SITE = Site(d_model=D, n_layers=L, layer=0, vocab_size=V, context=T)

adamw = partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95))
qk_norm = partial(QKNorm, norm=RMSNorm)
gated = partial(GatedMLP, activation=SiLU, ratio=2)


def attention(**changes: object) -> partial:
    """The baseline's attention, small: grouped queries, QK-norm, RoPE."""
    return partial(Attention, **{"n_heads": 4, "n_kv_heads": 2, "edits": [qk_norm, RoPE], "core": SDPA, **changes})


def block(**changes: object) -> partial:
    """The baseline's block, small."""
    return partial(Block, **{"norm": RMSNorm, "attention": attention(), "mlp": gated, **changes})


def tiny(**changes: object) -> BlaGPT:
    """The baseline, small; any argument of `BlaGPT` can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "n_layers": L, "block": block(), "norm": RMSNorm, "head": TiedHead,
        "init": GPT2Init(zero_outputs=True), "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return BlaGPT(**{**arguments, **changes})


def tiny_gpt2(**changes: object) -> BlaGPT:
    """GPT-2, small: LayerNorm, learned positions, tanh GELU, biases everywhere."""
    gpt2_attention = attention(n_kv_heads=None, edits=[], qkv_bias=True, out_bias=True)
    mlp = partial(MLP, activation=partial(GELU, tanh=True), bias=True)
    gpt2_block = block(norm=LayerNorm, attention=gpt2_attention, mlp=mlp)
    arguments = {
        "block": gpt2_block,
        "norm": LayerNorm,
        "positions": LearnedPositions,
        "init": GPT2Init(zero_outputs=False),
    }
    return tiny(**{**arguments, **changes})


VARIANTS = {  # sound models of several makes
    "baseline": tiny,
    "GPT-2": tiny_gpt2,
    "own head, post-norm, dropout": partial(
        tiny, head=partial(LinearHead, bias=True), block=block(post_norm=RMSNorm, dropout=0.1), dropout=0.1
    ),
    "no zero start, one kv head": partial(
        tiny, init=GPT2Init(zero_outputs=False), block=block(attention=attention(n_kv_heads=1))
    ),
    "short context": partial(tiny, context=11),
}


def batch(model: BlaGPT, size: int = 3, length: int = 23, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the targets that follow them, (B, T) each."""
    tokens = torch.randint(model.vocab_size, (size, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def heads(n: int, n_kv: int, dim: int) -> Heads:
    """Heads at the small site."""
    return Heads(SITE, n, n_kv, dim)


def carry_of(x: torch.Tensor) -> Carry:
    """What travels beside a stream (B, T, D) whose tokens do not matter."""
    return Carry(torch.zeros(x.shape[:2], dtype=torch.int64), x)


def shake(module: nn.Module, std: float = 0.05, seed: int = 0) -> nn.Module:
    """Move every parameter by N(0, std²), in place: a zero start hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=std)
    return module


@torch.no_grad()
def copy_mlp_and_norms(mine: Block, layer: nn.Module) -> None:
    """Write our gated MLP and norms into a layer of the Llama family."""
    gate, up = mine.mlp.part.gate_up.weight.chunk(2)
    layer.mlp.gate_proj.weight.copy_(gate)
    layer.mlp.up_proj.weight.copy_(up)
    layer.mlp.down_proj.weight.copy_(mine.mlp.part.down.weight)
    layer.input_layernorm.weight.copy_(mine.attention.norm.weight)
    layer.post_attention_layernorm.weight.copy_(mine.mlp.norm.weight)


class Graphs:
    """A backend of torch.compile that keeps the graphs it is given and compiles them as `inner` would."""

    def __init__(self, inner: str = "aot_eager") -> None:
        self.inner = lookup_backend(inner)
        self.seen: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.seen.append(graph.code)
        return self.inner(graph, inputs)


# Promises that take seconds each. `tests/lab/test_check.py` asks them of every shipped configuration; a variant of one answers the others.
LENGTHY = {"compiled", "accumulation", "optimizer", "resume", "overfits", "fresh data", "slopes"}


def check_variant(model: nn.Module) -> list:
    """The promises of a model that is another form of a shipped one: all but the lengthy."""
    return check_model(model, only=PROMISES.keys() - LENGTHY)
