"""Randomness as a function of the step: the same numbers on any rank, with any accumulation, and after any resume.

Cost     `torch.manual_seed` also speaks to every kind of accelerator that torch knows of, and for each one that is not
         there formats the stack of calls, twice a step: two thirds of all that a step cost beside the model
"""

import functools
from collections.abc import Callable

import torch


def mix(seed: int, *position: int) -> int:
    """A 32-bit seed for a place in the run, well spread (SplitMix64, Steele et al. 2014).

    Args:
        seed: the run's seed.
        position: integers that say where: the step, then the micro-batch.
    """
    state = 0
    for number in (seed, *position):  # the seed is spread first: seed 1 at step 1 must not be seed 0 at step 2
        state = (state + 0x9E3779B97F4A7C15 + number) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF


@functools.cache
def _seeder() -> Callable[[int], object] | None:
    """What seeds the accelerators of this machine, or None where there are none."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return None
    module = torch.get_device_module(device)
    return getattr(module, "manual_seed_all", None) or module.manual_seed


def reseed(seed: int, *position: int) -> None:
    """Seed torch's generators, on the CPU and on the machine's accelerators, for a place in the run."""
    number = mix(seed, *position)
    torch.default_generator.manual_seed(number)
    if (seeder := _seeder()) is not None:
        seeder(number)
