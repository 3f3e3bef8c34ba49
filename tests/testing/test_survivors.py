"""Bugs that one line of a promise alone can see: each line was once taken away, and no other test failed."""

import re

import pytest
import torch
from helpers import block, gated, tiny
from torch import Tensor, nn
from zoo import made

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import Carry, ChannelMixer, OutputLinear, Site
from blagpt_pl.testing.certificate import BROKEN, FIRM, certify
from blagpt_pl.testing.subject import Subject


def finishing(change):
    """A model whose features are changed at the end."""

    class Changed(BlaGPT):
        def finish(self, x: Tensor, carry: Carry, block: nn.Module | None = None) -> Tensor:
            return change(self, super().finish(x, carry, block))

    return Changed


def louder(self, x):
    return 30 * x if torch.is_autocast_enabled("cpu") else x


def infinite_slope(self, x):
    return x + (0 * x.float().sum()).sqrt() if torch.is_autocast_enabled("cpu") else x


def leak_with_gradients(self, x):
    return x + 1e-3 * x.roll(-1, 1) if torch.is_grad_enabled() and self.training else x


def noise(self, x):
    return x * (1 + 4e-6 * torch.rand((), device=x.device))


def short_is_else(self, x):
    return 1.5 * x if x.shape[1] < 4 else x


def rough_and_wrong(self, x):
    y = x.float().to(x.dtype)
    return 1.3 * y - (0.3 * y).detach()


def longest(self, x):
    self.__dict__["most"] = max(self.__dict__.get("most", 0), x.shape[1])
    return x * (1 + 0.01 * self.__dict__["most"])


class WritesTargets(BlaGPT):
    def objective(self, tokens, targets):
        found = super().objective(tokens, targets)
        targets.clamp_(min=0)
        return found


class ReadsTheEnd(BlaGPT):
    def objective(self, tokens, targets):
        total, parts = super().objective(tokens, targets)
        extra = 1e-3 * self.features(tokens)[:, -1].mean() * ((targets >= 0).sum() > 1)
        return total + extra, {**parts, "extra": extra}


class DeadColumn(ChannelMixer):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = OutputLinear(site.d_model, site.d_model)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.out(x * (torch.arange(x.shape[-1], device=x.device) > 0))


class TwiceTheGradientCompiled(ChannelMixer):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.mlp = gated(site)

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        y = self.mlp(x, carry)
        return 2 * y - y.detach() if torch.compiler.is_compiling() else y


BUGS = {
    "bf16 louder": (lambda: made(finishing(louder)), "bf16", "objective"),
    "bf16 infinite": (lambda: made(finishing(infinite_slope)), "bf16", "not finite"),
    "writes targets": (lambda: made(WritesTargets), "objective", "writes into the targets"),
    "leak with gradients": (lambda: made(finishing(leak_with_gradients)), "causality", "train mode"),
    "objective of the end": (lambda: made(ReadsTheEnd), "gradient causality", "objective"),
    "compiled gradients": (lambda: tiny(block=block(mlp=TwiceTheGradientCompiled)), "compiled", "gradient of"),
    "dead column": (lambda: tiny(block=block(mlp=DeadColumn)), "gradients", "dimension 1"),
    "longest so far": (lambda: made(finishing(longest)), "no memory", "after a longer batch"),
    "noise": (lambda: made(finishing(noise)), "batch", "the same input gave two outputs"),
    "rough": (lambda: made(finishing(rough_and_wrong)), "slopes", "its gradient says"),
    "short": (lambda: made(finishing(short_is_else)), "prefix", "the first [123] outputs"),
}


@pytest.mark.parametrize("name", BUGS)
def test_caught(name: str) -> None:
    build, promise, words = BUGS[name]
    torch.manual_seed(0)
    (verdict,) = certify(Subject(build()), {promise})
    assert verdict.state == BROKEN and re.search(words, verdict.found), (verdict.state, verdict.found)


def test_the_laws_are_these() -> None:
    assert FIRM == {
        "runs",
        "declarations",
        "causality",
        "gradient causality",
        "objective",
        "ruler",
        "fresh data",
        "resume",
    }


def test_a_vocabulary_too_small_is_not_here() -> None:
    (verdict,) = certify(Subject(tiny(vocab_size=2)), {"gradient causality"})
    assert verdict.state == "not here"


@torch.no_grad()
def test_certified_without_gradients_outside() -> None:
    assert {v.state for v in certify(Subject(tiny()), {"gradients", "slopes", "bf16"})} == {"kept"}
