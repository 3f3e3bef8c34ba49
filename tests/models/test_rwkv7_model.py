"""RWKV-7 as a model: the logits of its authors' package with our weights, whole and token by token; its size and cost by formula."""

import importlib.util
import os
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import adamw, shake
from overlaid import built as built_tiny
from overlaid import merged
from shipped import MODELS, built
from torch import Tensor

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import count
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.norm import LayerNorm
from blagpt_pl.nn.recurrent.delta import CHUNK
from blagpt_pl.nn.recurrent.rwkv7 import RWKV7TimeMix
from blagpt_pl.nn.recurrent.rwkv7_channel import RWKV7ChannelMix
from blagpt_pl.nn.recurrent.rwkv7_init import RWKV7Init
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing import check_model

V, T, D, L, K = 97, 40, 64, 3, 16


def goose(**changes: object) -> BlaGPT:
    """As the authors build it, small: an untied head, FFN of four times the width."""
    one = partial(Block, norm=LayerNorm, attention=partial(RWKV7TimeMix, head_dim=K), mlp=RWKV7ChannelMix)
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "n_layers": L, "block": one, "norm": LayerNorm, "head": LinearHead,
        "init": RWKV7Init(), "optimizer": adamw, "schedule": Constant, "embedding_norm": LayerNorm,
    }  # fmt: skip
    return BlaGPT(**{**arguments, **changes})


def exported(model: BlaGPT) -> dict[str, Tensor]:
    """Our weights under the names of the authors' checkpoints; low ranks are D × R and R × D there, too."""
    found = {"emb.weight": model.embedding.weight, "head.weight": model.head.linear.weight}
    for name, norm in {"blocks.0.ln0": model.embedding_norm, "ln_out": model.norm}.items():
        found |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for i, one in enumerate(model.blocks):
        att, ffn = one.attention.part, one.mlp.part
        norms = {"ln1": one.attention.norm, "ln2": one.mlp.norm, "att.ln_x": att.norm}
        maps = {"receptance": att.r, "key": att.k, "value": att.v, "output": att.out}
        low = {"w": att.to_decay, "a": att.to_rate, "v": att.to_value, "g": att.to_gate}
        vectors = {
            "w0": att.decay, "a0": att.rate, "v0": att.value, "k_k": att.removal, "k_a": att.mildness, "r_k": att.bonus,
        }  # fmt: skip
        vectors |= {f"x_{s}": mix for s, mix in zip("rwkvag", att.mix, strict=True)}
        vectors |= {f"{s}{n}": p for s, f in low.items() if f for n, p in ((1, f.down), (2, f.up))}
        mine = {f"att.{name}": p for name, p in vectors.items() if p is not None}
        mine |= {f"att.{name}.weight": linear.weight for name, linear in maps.items()}
        mine |= {f"{name}.{p}": getattr(norm, p) for name, norm in norms.items() for p in ("weight", "bias")}
        mine |= {"ffn.x_k": ffn.mix, "ffn.key.weight": ffn.up.weight, "ffn.value.weight": ffn.down.weight}
        found |= {f"blocks.{i}.{name}": p for name, p in mine.items()}
    return {name: p.detach().clone() for name, p in found.items()}


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`rwkv.model`, which reads what it shall be from the environment when it is imported."""
    pytest.importorskip("rwkv")
    for name, value in {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}.items():
        monkeypatch.setitem(os.environ, name, value)
    spec = importlib.util.find_spec("rwkv.model")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_it_is_the_authors_package(package: ModuleType, tmp_path: Path) -> None:
    model = shake(goose(), 0.1).eval()
    weights = exported(model)
    assert sum(p.numel() for p in weights.values()) == count(model.parameters())
    torch.save(weights, tmp_path / "ours.pth")
    theirs = package.RWKV(model=str(tmp_path / "ours"), strategy="cpu fp32")
    tokens = torch.randint(V, (T,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        ours = model(torch.tensor([tokens]))[0]
    whole, _ = theirs.forward(tokens, None, full_output=True)
    state, single = None, []
    for token in tokens:
        logits, state = theirs.forward([token], state)
        single.append(logits)
    scale = ours.abs().max()
    assert scale > 1
    for expected in (whole, torch.stack(single)):
        assert (ours - expected).abs().max() < 3e-5 * scale


def test_its_size_is_its_formula() -> None:
    full = built("blagpt.yaml", "--config", str(MODELS["rwkv7"])).model
    vocab, width, layers, ranks = 50304, 768, 12, (64, 64, 32, 128)
    mixers = layers * (4 * width**2 + 2 * width * sum(ranks) + 14 * width) - (2 * width * ranks[2] + width)
    norms = 2 * (layers * 2 * width + 2 * width)
    assert count(full.parameters()) == vocab * width + norms + mixers + layers * (7 * width**2 + width)


@pytest.mark.parametrize("context", [32, 128])
def test_its_cost_is_its_formula_whatever_the_context(context: int) -> None:
    maps = L * (12 * D**2 + 2 * D * 4 * 32) - 2 * D * 32 + V * D
    step = CHUNK * 10 * K + 4 * K**2 + K**3 // CHUNK + (CHUNK**2 - 4) // 3
    assert count_flops(goose(context=context), context).forward_per_token == 2 * (maps + L * (D // K) * step)


SHORT = ["runs", "roles", "first loss", "causality", "long memory", "prefix", "gradients", "bf16", "generate"]


def test_promises_of_the_authors_form() -> None:
    """With a head of its own; all of the shipped configuration: `blagpt check`."""
    verdicts = check_model(goose(n_layers=2, context=24), only=SHORT)
    assert all(v.state == "kept" for v in verdicts)


def test_it_generates_beyond_its_context() -> None:
    """What it remembers does not grow: a token costs a token, and nothing is forgotten at once."""
    model = shake(goose(context=16), 0.1)
    prompt = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(3))
    tokens = model.generate(prompt, 40, temperature=0.0)
    longer = goose(context=64)
    longer.load_state_dict(model.state_dict())
    assert torch.equal(tokens, longer.generate(prompt, 40, temperature=0.0))


def test_one_layer_is_enough() -> None:
    tree = merged(model="rwkv7")
    tree["model"]["init_args"]["n_layers"] = 1
    model = built_tiny(tree)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any("to_value" in name for name, _ in model.named_parameters())
