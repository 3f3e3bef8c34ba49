"""Every part keeps the promises of its kind: one line a part."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import attention, block, gated, qk_norm
from torch import Tensor, nn

import blagpt_pl.nn
from blagpt_pl.nn import base
from blagpt_pl.nn.activation import GELU, ReLU2, SiLU
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_meta import MetaWindowed
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.core_window import Windowed
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.attention.shared import ScaledQueries, SharedAttention
from blagpt_pl.nn.base import (
    Activation,
    Carry,
    ChannelMixer,
    Core,
    Head,
    HeadEdit,
    Norm,
    Part,
    Positions,
    SequenceMixer,
)
from blagpt_pl.nn.block import Block, SoloBlock
from blagpt_pl.nn.cross_block import ReadContext
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.mlp import MLP
from blagpt_pl.nn.mlp_pattention import PattentionMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.nn.recurrent.conv import GatedShortConv
from blagpt_pl.nn.recurrent.mamba1 import Mamba1
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.recurrent.parallel_heads import HybridSite, HymbaMixer
from blagpt_pl.nn.recurrent.rwkv7 import RWKV7TimeMix
from blagpt_pl.nn.recurrent.rwkv7_channel import RWKV7ChannelMix
from blagpt_pl.testing import check_part, kind_of

latent = partial(LatentAttention, n_heads=4, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=8, norm=RMSNorm, core=SDPA)


class InHymba(partial):
    """A mixer of Hymba: in a local layer that shares nothing, then in a global one, five positions before the text."""

    def __call__(self, site: base.Site) -> HymbaMixer:
        return super().__call__(HybridSite(**vars(site), order="lg", meta=5))


PARTS = {
    "RMSNorm": RMSNorm,
    "LayerNorm": LayerNorm,
    "LayerNorm, no bias": partial(LayerNorm, bias=False),
    "LayerNorm, no parameters": partial(LayerNorm, gain=False, bias=False),
    "SiLU": SiLU,
    "GELU": GELU,
    "GELU, tanh": partial(GELU, tanh=True),
    "ReLU2": ReLU2,
    "MLP": partial(MLP, activation=GELU, bias=True),
    "GatedMLP": gated,
    "QKNorm": qk_norm,
    "RoPE": RoPE,
    "KVShift": KVShift,
    "SDPA": SDPA,
    "SDPA, dropout": partial(SDPA, dropout=0.2),
    "Dilated": partial(Dilated, segments=[4, 8, 16], dilations=[1, 2, 4]),
    "Dilated, rates beyond the heads": partial(Dilated, segments=[5, 8, 21], dilations=[1, 8, 3]),
    "Dilated, long segments": partial(Dilated, segments=[64, 128], dilations=[1, 2]),
    "SoftCapped": SoftCapped,
    "SoftCapped, tight": partial(SoftCapped, cap=1.0),
    "Windowed": partial(Windowed, window=5),
    "Windowed, soft-capped": partial(Windowed, window=31, cap=2.0),
    "Attention": attention(qkv_bias=True, out_bias=True),
    "Attention, no edits": attention(edits=None),
    "Attention, one kv head": attention(n_kv_heads=1, head_dim=10),
    "PattentionAttention": partial(PattentionAttention, n_heads=4, n_tokens=48, core=SDPA, edits=[RoPE]),
    "PattentionAttention, grouped": partial(PattentionAttention, n_heads=4, n_tokens=40, core=SDPA, n_kv_heads=2),
    "PattentionMLP": partial(PattentionMLP, n_tokens=64),
    "LatentAttention": latent,
    "LatentAttention, latent queries": partial(latent, q_rank=10),
    "LatentAttention, wide values": partial(latent, v_dim=20),
    "LowRankAttention": partial(
        LowRankAttention,
        n_heads=4,
        n_kv_heads=2,
        rank=6,
        edits=[qk_norm, RoPE],
        core=SDPA,
        qkv_bias=True,
        out_bias=True,
    ),
    "LearnedPositions": LearnedPositions,
    "TiedHead": TiedHead,
    "LinearHead": partial(LinearHead, bias=True),
    "TiedHead, softcap": partial(TiedHead, softcap=3.0),
    "LinearHead, softcap": partial(LinearHead, softcap=3.0),
    "Block": block(),
    "Block, post-norm, dropout": block(post_norm=RMSNorm, dropout=0.2),
    "SoloBlock": partial(SoloBlock, norm=RMSNorm, part=attention()),
    "ScaledQueries": partial(ScaledQueries, factor=1.5),
    "SharedAttention": partial(SharedAttention, n_heads=4, norm=RMSNorm, core=SDPA, edits=[RoPE]),
    "GatedShortConv": partial(GatedShortConv, bias=True),
    "Mamba1": partial(Mamba1, d_state=6),
    "Mamba1, normed": partial(Mamba1, d_state=4, dt_rank=5, norm=RMSNorm),
    "MetaWindowed": partial(MetaWindowed, window=6, always=3),
    "HymbaMixer": InHymba(HymbaMixer, n_heads=4, core=SDPA, norm=RMSNorm, window=6, n_kv_heads=2, d_state=4),
    "Mamba2": partial(Mamba2, d_state=6, head_dim=8, chunk=8),
    "Mamba2, groups, norm before gate": partial(Mamba2, d_state=4, head_dim=4, n_groups=2, norm_before_gate=True),
    "RWKV7TimeMix": partial(RWKV7TimeMix, head_dim=8),
    "RWKV7TimeMix, narrow": partial(RWKV7TimeMix, head_dim=4, decay_rank=3, rate_rank=5, value_rank=2, gate_rank=6),
    "RWKV7ChannelMix": partial(RWKV7ChannelMix, ratio=3.5),
}
KINDS = (Part, SequenceMixer, ChannelMixer, HeadEdit, Core, Norm, Activation, Positions, Head)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_promises(part: Callable) -> None:
    check_part(part)


def test_every_part_stands_in_the_table() -> None:
    found = set()
    for module in pkgutil.walk_packages(blagpt_pl.nn.__path__, "blagpt_pl.nn."):
        classes = inspect.getmembers(importlib.import_module(module.name), inspect.isclass)
        found |= {c for _, c in classes if c.__module__ == module.name and issubclass(c, (*KINDS, Block))}
    found = {c for c in found if not inspect.isabstract(c)}
    found -= {ReadContext}  # reads what a CrossBlock's carry holds, and is tested with it
    missing = {c.__name__ for c in found - set(KINDS) - {kind_of(part) for part in PARTS.values()}}
    assert not missing, f"add one line to PARTS for each of {sorted(missing)}"


def test_every_kind_is_known_here() -> None:
    kinds = {c for _, c in inspect.getmembers(base, inspect.isclass) if c.__module__ == base.__name__}
    kinds = {
        c
        for c in kinds
        if issubclass(c, nn.Module) and c not in (base.OutputLinear, base.StackedLinear, base.Continuing)
    }
    assert kinds == set(KINDS)


# ---------------------------------------------------------------------- the promises can be broken


class Mixer(SequenceMixer):
    """A causal mean over the past, to be spoilt."""

    def __init__(self, site: base.Site) -> None:
        super().__init__()
        self.linear = nn.Linear(site.d_model, site.d_model)

    def mean(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.linear(self.mean(x))


class Future(Mixer):
    def mean(self, x: Tensor) -> Tensor:
        return x + 1e-3 * x.roll(-1, dims=1)


class FutureInTraining(Mixer):
    def mean(self, x: Tensor) -> Tensor:
        return super().mean(x) + (x.mean(1, keepdim=True) if self.training else 0)


class FutureInChunks(Mixer):
    """Causal between chunks of 8, not within one."""

    def mean(self, x: Tensor) -> Tensor:
        return super().mean(x) + torch.cat([c.mean(1, keepdim=True).expand_as(c) for c in x.split(8, 1)], 1)


class FutureTokens(Mixer):
    """Causal in the stream, but not in the tokens that travel beside it."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry) + carry.tokens.roll(-1, dims=1)[..., None].to(x.dtype)


class Deaf(Mixer):
    """Forgets the first position."""

    def mean(self, x: Tensor) -> Tensor:
        return super().mean(torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1))


class MixesNothing(Mixer):
    def mean(self, x: Tensor) -> Tensor:
        return x


class BatchMax(Mixer):
    """A softmax made stable with the maximum over the batch is one thing, a norm by it another."""

    def mean(self, x: Tensor) -> Tensor:
        return super().mean(x) / x.abs().amax(dim=(0, 2), keepdim=True)


class Remembers(Mixer):
    last = 0.0

    def mean(self, x: Tensor) -> Tensor:
        self.last, before = x.detach().mean(), self.last
        return super().mean(x) + before


class Idle(Mixer):
    def __init__(self, site: base.Site) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.ones(()))


class Narrow(Mixer):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry)[..., :-1]


class Upcasts(Mixer):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry).float()


class Infinite(Mixer):
    def mean(self, x: Tensor) -> Tensor:
        return super().mean(x) / 0


class LearnsNothing(Mixer):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return super().forward(x, carry) * 1e-4


class MixingChannels(ChannelMixer):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return x.cumsum(1)


class RotatesTheFuture(RoPE):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(q, k.roll(-1, dims=2), v, carry)


class Bidirectional(SDPA):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


BROKEN = {
    Future: "looks into the future",
    FutureInTraining: "train mode: looks into the future",
    FutureInChunks: "looks into the future",
    FutureTokens: "looks into the future",
    Deaf: "no output moves with input 0",
    MixesNothing: "nothing is mixed",
    BatchMax: "from the same sequence alone",
    Remembers: "outlives a batch|same sequence alone",
    Idle: r"no gradient reaches 0\.gain",
    Narrow: "width 32 became 31",
    Upcasts: "float32 out",
    Infinite: "not finite",
    LearnsNothing: "regression loss",
    lambda site: MixingChannels(): "between positions",
    RotatesTheFuture: "looks into the future",
    Bidirectional: "looks into the future",
}


@pytest.mark.parametrize(("part", "message"), BROKEN.items(), ids=[getattr(p, "__name__", "?") for p in BROKEN])
def test_a_broken_promise_is_told(part: Callable, message: str) -> None:
    check_part(Mixer)
    with pytest.raises(AssertionError, match=message):
        check_part(part)


def test_a_parameter_that_is_rightly_idle_can_be_named() -> None:
    check_part(Idle, idle={"0.gain", "1.gain"})


def test_a_built_module_is_checked_and_left_alone() -> None:
    part = Mixer(base.Site(32, 2, 0, 61, 32)).train()
    before = [p.clone() for p in part.parameters()]
    check_part(part)
    assert part.training
    assert all(map(torch.equal, before, part.parameters()))
