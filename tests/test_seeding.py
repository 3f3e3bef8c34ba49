"""Randomness as a function of the place in the run."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blagpt_pl.seeding import mix, reseed

INTEGERS = st.integers(0, 2**40)


@given(INTEGERS, st.lists(INTEGERS, max_size=3))
def test_a_32_bit_number(seed: int, position: list[int]) -> None:
    assert 0 <= mix(seed, *position) < 2**32
    assert mix(seed, *position) == mix(seed, *position)


def test_the_same_in_every_process() -> None:
    code = "from blagpt_pl.seeding import mix; print(mix(1337, 5, 2))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert int(out.stdout) == mix(1337, 5, 2)


def _root() -> str:
    import blagpt_pl

    return str(next(iter(blagpt_pl.__path__)) + "/..")


def test_the_order_of_numbers_matters() -> None:
    assert mix(0, 1, 2) != mix(0, 2, 1)
    assert len({mix(0), mix(0, 0), mix(0, 0, 0)}) == 3


@pytest.mark.parametrize("shift", [1, -1, 2])
def test_runs_of_neighbouring_seeds_share_nothing(shift: int) -> None:
    """Seed s + 1 must not draw at step t what seed s draws at step t + 1."""
    steps = range(1000)
    ours = {mix(7, step, micro) for step in steps for micro in range(4)}
    theirs = {mix(7 + shift, step, micro) for step in steps for micro in range(4)}
    assert len(ours & theirs) <= 1  # by chance 4000² / 2³² = 0.004


def test_places_do_not_collide() -> None:
    places = [(seed, step, micro) for seed in range(10) for step in range(500) for micro in range(16)]
    values = {mix(*place) for place in places}
    expected = len(places) ** 2 / 2**33  # about 0.7 pairs, by the birthday problem
    assert len(places) - len(values) <= expected + 6 * math.sqrt(expected) + 1


def test_every_bit_is_fair_and_independent_of_the_next_step() -> None:
    n = 4000
    values = torch.tensor([mix(3, step) for step in range(n)])
    bits = (values[:, None] >> torch.arange(32)) & 1  # (n, 32)
    bound = 5 * 0.5 / math.sqrt(n)
    assert (bits.double().mean(0) - 0.5).abs().max() < bound
    assert ((bits[1:] ^ bits[:-1]).double().mean(0) - 0.5).abs().max() < bound


def test_reseed_decides_what_is_drawn() -> None:
    def draw(*place: int) -> torch.Tensor:
        reseed(*place)
        return torch.rand(8)

    assert torch.equal(draw(1, 2, 3), draw(1, 2, 3))
    assert not torch.equal(draw(1, 2, 3), draw(1, 2, 4))
    assert not torch.equal(draw(1, 2, 3), draw(2, 2, 3))
    assert torch.initial_seed() == mix(2, 2, 3)


@pytest.mark.gpu
def test_reseed_seeds_the_gpu_too() -> None:
    draws = []
    for _ in range(2):
        reseed(1, 2)
        draws.append(torch.rand(8, device="cuda"))
    assert torch.equal(*draws)
