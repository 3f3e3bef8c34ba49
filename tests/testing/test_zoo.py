"""Every planted bug breaks its promises, and tells so; the same model without the bug keeps them."""

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from zoo import ZOO, Bug

from blagpt_pl.testing.certificate import BROKEN, KEPT, PROMISES, Verdict, certify
from blagpt_pl.testing.subject import Subject


def examined(build: Callable, *promises: str, clip: float | None = None) -> list[Verdict]:
    """The verdicts on a model that is built under seed 0."""
    torch.manual_seed(0)
    return list(certify(Subject(build(), clip=clip), only=promises))


@cache
def sound(build: Callable, promise: str) -> Verdict:
    """The verdict on a sound model; many bugs share one."""
    (verdict,) = examined(build, promise)
    return verdict


@pytest.mark.parametrize("bug", ZOO.values(), ids=ZOO)
def test_a_bug_is_caught_and_the_model_without_it_is_not(bug: Bug) -> None:
    for verdict in examined(bug.build, *bug.broken, clip=bug.clip):
        assert verdict.state == BROKEN, f"{verdict.promise} is {verdict.state}: {verdict.found}"
        assert re.search(bug.broken[verdict.promise], verdict.found), f"{verdict.promise}: {verdict.found}"
    for promise in bug.broken:
        verdict = sound(bug.sound, promise)
        assert verdict.state == KEPT, f"without the bug, {promise}: {verdict.found}"


def test_every_promise_is_broken_by_some_bug() -> None:
    assert {promise for bug in ZOO.values() for promise in bug.broken} == PROMISES.keys()
