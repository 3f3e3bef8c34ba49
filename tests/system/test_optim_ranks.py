"""Every shipped optimizer on two ranks, DDP and FSDP2: what one rank does, the same bits on both, and on from a saved state."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from helpers import V, shake, tiny
from overlays import NAMES, SURE, factory
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.seeding import reseed
from blagpt_pl.sharding import shard

STEPS, ROWS, LENGTH = 3, 3, 12
LOCAL = {"demo"}  # gradients stay on their rank: two ranks are not one (test_demo_ranks.py)
SHARED = [name for name in NAMES if name not in LOCAL]
WHOLE = StateDictOptions(full_state_dict=True)


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    return shake(tiny(n_layers=1, optimizer=factory(name, *SURE.get(name, ()))))


def data() -> Tensor:
    """(2 · steps, ranks, rows, length + 1) tokens."""
    return torch.randint(V, (2 * STEPS, RANKS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(objective: nn.Module, optimizer: torch.optim.Optimizer, ranks: slice, steps: range) -> None:
    for step in steps:
        rows = data()[step, ranks].flatten(0, 1)
        optimizer.zero_grad()
        objective(rows[..., :-1], rows[..., 1:]).backward()
        reseed(0, step)
        optimizer.step()


FIRST, SECOND = range(STEPS), range(STEPS, 2 * STEPS)


def work(rank: int, folder: Path) -> None:
    """One rank of two: train every one under both strategies, save, load, go on."""
    with joined(rank, folder) as (mesh, results):
        mine = slice(rank, rank + 1)
        for name in SHARED:
            model = fresh(name)
            optimizer = model.make_optimizer()
            objective = DistributedDataParallel(Objective(model))
            train(objective, optimizer, mine, FIRST)
            results[name, "ddp"] = full(dict(model.named_parameters()))
            again = model.make_optimizer()
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train(objective, again, mine, SECOND)
            results[name, "ddp, on"] = full(dict(model.named_parameters()))
            model = fresh(name)
            shard(model, model.regions(), mesh)
            optimizer = model.make_optimizer()
            train(Objective(model), optimizer, mine, FIRST)
            results[name, "fsdp"] = full(dict(model.named_parameters()))
            saved = get_optimizer_state_dict(model, optimizer, options=WHOLE)
            model = fresh(name)
            model.load_state_dict(results[name, "fsdp"], strict=False)  # a tied head stands there once
            shard(model, model.regions(), mesh)
            again = model.make_optimizer()
            set_optimizer_state_dict(model, again, saved, options=WHOLE)
            train(Objective(model), again, mine, SECOND)
            results[name, "fsdp, on"] = full(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of two ended with."""
    return run(work, tmp_path_factory.mktemp("optim"))


def alone(name: str, steps: int) -> dict[str, Tensor]:
    """What one rank ends with."""
    model = fresh(name)
    train(Objective(model), model.make_optimizer(), slice(0, RANKS), range(steps))
    return full(dict(model.named_parameters()))


def test_two_ranks_are_one(results: list[dict]) -> None:
    """One test, so that the ranks run once, however many processes share the tests."""
    for name, kind in itertools.product(SHARED, ("ddp", "ddp, on", "fsdp", "fsdp, on")):
        start = {n: p.detach() for n, p in fresh(name).named_parameters()}
        one = alone(name, 2 * STEPS if "on" in kind else STEPS)
        for n, p in one.items():
            found = [result[name, kind][n] for result in results]
            assert torch.equal(*found), (name, kind, n)  # replicas never drift
            moved = (p - start[n]).abs().mean()
            assert (found[0] - p).abs().mean() <= 1e-3 * moved + 1e-7, (name, kind, n)  # a step all sign may flip a 0
