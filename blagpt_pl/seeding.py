"""Randomness as a function of the step: the same numbers on any rank, with any accumulation, and after any resume."""

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


def reseed(seed: int, *position: int) -> None:
    """Seed torch's generators, on the CPU and on every accelerator, for a place in the run."""
    torch.manual_seed(mix(seed, *position))
