"""The certificate: what a verdict is, what may be declared, that looking changes nothing, and no false alarm."""

import random
import re
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from helpers import VARIANTS, attention, block, gated, qk_norm, tiny
from torch import Tensor, nn
from zoo import made
from zoo_models import Unused
from zoo_parts import Masked, OffByOne, ShortWindow

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import GELU, ReLU2
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.base import Carry, ChannelMixer, Norm, Site
from blagpt_pl.nn.head import TiedHead
from blagpt_pl.nn.mlp import MLP, GatedMLP
from blagpt_pl.nn.mlp_pattention import PattentionMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.testing import check_model
from blagpt_pl.testing.certificate import BROKEN, DECLARED, FIRM, KEPT, NOT_HERE, PROMISES, Verdict, certify, claim
from blagpt_pl.testing.subject import Subject

# ---------------------------------------------------------------------- no false alarm


def attending(kind: Callable) -> partial:
    return partial(tiny, block=block(attention=kind))


class Float32Norm(Norm):
    """As most are written: in float32, whatever it is given, float64 too."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight.float()).to(x.dtype)


class Balanced(ChannelMixer):
    """Two experts of which each token takes the better; a bias, moved by the load in training, evens them out.

    Wang et al. 2024, arXiv:2408.15664
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.experts = nn.ModuleList(gated(site) for _ in range(2))
        self.router = nn.Linear(site.d_model, 2, bias=False)
        self.register_buffer("bias", torch.zeros(2))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        scores = self.router(x).sigmoid()  # (B, T, 2)
        taken = nn.functional.one_hot((scores + self.bias).argmax(-1), 2).to(x.dtype)
        if self.training:
            with torch.no_grad():
                self.bias.sub_(0.1 * (taken.mean((0, 1)) - 0.5))
        return sum(w * e(x, carry) for w, e in zip((taken * scores).split(1, -1), self.experts, strict=True))


SOUND = {
    "float32 inside": partial(tiny, norm=Float32Norm, block=block(norm=Float32Norm)),
    "a buffer that training moves": partial(tiny, block=block(mlp=Balanced)),
    **VARIANTS,
    "long context": partial(tiny, context=64, vocab_size=128),
    "ReLU2": partial(tiny, block=block(mlp=partial(GatedMLP, activation=ReLU2, ratio=2))),
    "plain mlp, LayerNorm": partial(tiny, norm=LayerNorm, block=block(mlp=partial(MLP, activation=GELU))),
    "latent attention": attending(
        partial(LatentAttention, n_heads=4, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=8, norm=RMSNorm, core=SDPA)
    ),
    "low rank": attending(partial(LowRankAttention, n_heads=4, n_kv_heads=2, rank=6, edits=[RoPE], core=SDPA)),
    "Pattention": partial(
        tiny,
        block=block(
            attention=partial(PattentionAttention, n_heads=4, n_tokens=48, core=SDPA, edits=[RoPE]),
            mlp=partial(PattentionMLP, n_tokens=64),
        ),
    ),
    "dilated": attending(attention(core=partial(Dilated, segments=[4, 8, 32], dilations=[1, 2, 4]))),
    "key/value shift": attending(attention(edits=[qk_norm, RoPE, KVShift])),
    "attention soft-capped": attending(attention(core=SoftCapped)),
    "attention dropout": attending(attention(core=partial(SDPA, dropout=0.2))),
    "multi-token": partial(tiny, losses=[partial(MultiToken, n=3)]),
    "z-loss": partial(tiny, losses=[ZLoss]),
    "all terms, token bias, soft cap": partial(
        tiny, losses=[partial(MultiToken, n=2), ZLoss], token_bias=True, head=partial(TiedHead, softcap=15.0)
    ),
}
SLOW = {"compiled", "overfits", "fresh data"}  # a second or more each
RUNS = {"accumulation", "optimizer", "resume"}  # the next slowest


def alarms(build: Callable, seed: int, only: set[str]) -> list[Verdict]:
    """The promises that a model built under a seed does not keep, also examined under that seed."""
    torch.manual_seed(seed)
    return [v for v in certify(Subject(build()), only, seed) if v.state != KEPT]


@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND)
def test_no_false_alarm(build: Callable) -> None:
    assert alarms(build, 1, PROMISES.keys() - SLOW) == []
    assert alarms(build, 2, PROMISES.keys() - SLOW - RUNS) == []


@pytest.mark.slow
@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND)
def test_no_false_alarm_under_ten_seeds(build: Callable) -> None:
    assert [v for seed in range(10) for v in alarms(build, seed, PROMISES.keys() - {"compiled"})] == []
    assert alarms(build, 0, {"compiled"}) == []


# ---------------------------------------------------------------------- verdicts


@pytest.fixture(scope="module")
def whole() -> list[Verdict]:
    """The whole certificate of the tiny baseline."""
    torch.manual_seed(0)
    return list(certify(Subject(tiny(), clip=1.0)))


def verdict_on(model: nn.Module, promise: str, **facts: object) -> Verdict:
    (verdict,) = certify(Subject(model, **facts), only={promise})
    return verdict


def test_a_sound_model_keeps_every_promise(whole: list[Verdict]) -> None:
    assert [v.promise for v in whole] == list(PROMISES)
    assert {v.state for v in whole} == {KEPT}
    assert all(v.found and v.seconds >= 0 for v in whole)


def test_what_is_found_does_not_depend_on_what_else_is_looked_at(whole: list[Verdict]) -> None:
    torch.manual_seed(0)
    model = tiny()
    for verdict in whole:
        if verdict.promise not in SLOW:
            assert verdict_on(model, verdict.promise, clip=1.0).found == verdict.found


def test_the_seed_decides_what_is_looked_at() -> None:
    model = tiny()
    found = [[v.found for v in certify(Subject(model), {"long memory"}, seed)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_every_promise_says_what_it_claims() -> None:
    claims = [claim(name) for name in PROMISES]
    assert all(line.endswith(".") for line in claims)
    assert len(set(claims)) == len(claims)
    assert PROMISES.keys() >= FIRM


def test_an_unknown_promise_is_told() -> None:
    with pytest.raises(
        ValueError,
        match=r"'casuality' is no promise \(expected runs, declarations, roles, parameters, first loss, caus",
    ):
        list(certify(Subject(tiny()), only={"casuality"}))


class Raises(BlaGPT):
    def features(self, tokens: Tensor) -> Tensor:
        raise RuntimeError("nothing works\nand here are details")


class Silent(BlaGPT):
    def features(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


def test_an_error_inside_is_a_finding_and_no_crash() -> None:
    (only,) = certify(Subject(made(Raises)))  # what does not run at all is not examined further
    assert (only.promise, only.state) == ("runs", BROKEN)
    assert re.fullmatch(
        r"RuntimeError in Raises \(test_certificate\.py:\d+\): nothing works and here are details", only.found
    )
    for promise in ("causality", "compiled", "resume", "overfits"):
        assert verdict_on(made(Raises), promise).state == BROKEN
    assert verdict_on(made(Silent), "causality").found.endswith("): no message")


class WithoutTable(BlaGPT):
    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        x = nn.functional.one_hot(tokens, self.vocab_size).to(self.embedding.weight.dtype) @ self.embedding.weight
        carry = Carry(tokens, x)
        for part in self.blocks[:-1]:
            x = part(x, carry)
        return x, carry


def test_what_cannot_be_examined_is_said_so() -> None:
    verdict = verdict_on(made(WithoutTable), "gradient causality")
    assert (verdict.state, verdict.found) == (NOT_HERE, "no nn.Embedding reads the tokens")


def test_check_model_raises_the_first_broken_promise() -> None:
    with pytest.raises(AssertionError, match=r"causality: BlaGPT in train mode, 13 tokens: looks into the future"):
        check_model(tiny(block=block(attention=attention(core=OffByOne))))
    verdicts = check_model(tiny(), only={"causality", "roles"})
    assert [v.promise for v in verdicts] == ["roles", "causality"]


def test_the_number_of_parameters_is_compared_with_what_was_announced() -> None:
    model = tiny()
    n = sum(p.numel() for p in model.parameters())
    assert verdict_on(model, "parameters", described=n).found == f"{n:,}, as described"
    verdict = verdict_on(model, "parameters", described=n + 1)
    assert (verdict.state, verdict.found) == (BROKEN, f"{n:,} parameters, but describe counts {n + 1:,}")


# ---------------------------------------------------------------------- what may be declared


class Windowed(BlaGPT):
    """Says that it has a window, and that it looks into the future."""

    exempt: ClassVar = {"long memory": "a window of 8 tokens", "causality": "it would be so much easier"}


def test_a_declared_exemption_is_told_with_its_reason() -> None:
    model = made(Windowed, block=block(attention=attention(core=ShortWindow)))
    verdict = verdict_on(model, "long memory")
    assert (verdict.state, verdict.found) == (DECLARED, "a window of 8 tokens")
    check_model(model, only={"long memory"})


class OpenlyShort(ShortWindow):
    """A part that says what it does not do."""

    exempt: ClassVar = {"long memory": "a window of 8 tokens a layer"}


def test_a_part_may_declare_an_exemption_as_well() -> None:
    verdict = verdict_on(tiny(block=block(attention=attention(core=OpenlyShort))), "long memory")
    assert (verdict.state, verdict.found) == (DECLARED, "a window of 8 tokens a layer")


def test_a_promise_that_is_kept_is_kept_whatever_was_declared() -> None:
    assert verdict_on(made(Windowed), "long memory").state == KEPT


@pytest.mark.parametrize("promise", sorted(FIRM))
def test_no_model_is_exempt_from_a_law(promise: str) -> None:
    class Easy(Raises):
        exempt: ClassVar = {promise: "it would be so much easier"}

    assert verdict_on(made(Easy), promise).state == BROKEN


class Spare(ChannelMixer):
    """An mlp with a gain that nothing reads, and which says so."""

    idle: ClassVar = {"gain": "read by the eighth layer only"}

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.mlp = gated(site)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.mlp(x, carry)


def test_a_parameter_may_be_declared_idle_by_its_module_or_by_the_caller() -> None:
    verdict = verdict_on(tiny(block=block(mlp=Spare)), "gradients")
    assert verdict.state == KEPT
    assert verdict.found.endswith(", 2 declared idle")
    check_model(made(Unused), idle={"gain"}, only={"gradients"})
    with pytest.raises(AssertionError, match="gradients: .*no gradient reaches gain"):
        check_model(made(Unused), only={"gradients"})


# ---------------------------------------------------------------------- looking changes nothing


def test_looking_leaves_the_model_and_all_generators_as_they_were() -> None:
    model = tiny(dropout=0.1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = set(vars(model))
    generators = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    for verdict in certify(Subject(model), PROMISES.keys() - {"overfits", "fresh data"}):
        assert torch.equal(torch.get_rng_state(), generators[0]), verdict.promise
        assert (random.getstate(), repr(np.random.get_state())) == generators[1:], verdict.promise
        assert model.training, verdict.promise
        assert all(p.grad is None for p in model.parameters()), verdict.promise
        after = model.state_dict()
        assert after.keys() == before.keys(), verdict.promise
        assert all(torch.equal(before[name], after[name]) for name in before), verdict.promise
    assert set(vars(model)) == attributes


def test_a_sound_mask_of_its_own_is_sound() -> None:
    """What the leaking masks of the zoo are derived from."""
    torch.manual_seed(0)
    check_model(tiny(block=block(attention=attention(core=Masked))), only=PROMISES.keys() - SLOW)
