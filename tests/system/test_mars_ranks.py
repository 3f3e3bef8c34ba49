"""MARS on two ranks: under DDP it keeps copies of its gradients, under FSDP2 its norms are of whole tensors."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import V, shake, tiny
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.optim import mars
from blagpt_pl.optim.mars import MARS
from blagpt_pl.sharding import shard

STEPS, ROWS, LENGTH = 4, 3, 12


def fresh(**values: float) -> nn.Module:
    """A model whose gradients are cut in some tensors and not in others."""
    torch.manual_seed(0)
    return shake(tiny(n_layers=2, optimizer=partial(MARS, **{"lr": 0.01, "weight_decay": 0.1, "eps": 1e-4, **values})))


def train(objective: nn.Module, optimizer: torch.optim.Optimizer, ranks: slice, forget: bool = True) -> None:
    """Steps on the rows of these ranks; gradients that are not forgotten keep their memory from step to step."""
    data = torch.randint(V, (STEPS, RANKS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    for rows in data[:, ranks].flatten(1, 2):
        optimizer.zero_grad(set_to_none=forget)
        (4 * objective(rows[..., :-1], rows[..., 1:])).backward()
        optimizer.step()


def norms_here(parts: list[Tensor], like: list[Tensor]) -> Tensor:
    """Wrong where tensors are sharded."""
    return torch.stack(torch._foreach_norm(parts))


def work(rank: int, folder: Path) -> None:
    """One rank of two: train under both strategies, and with norms of what this rank alone has."""
    with joined(rank, folder) as (mesh, results):
        mine = slice(rank, rank + 1)
        model = fresh()
        ddp = DistributedDataParallel(Objective(model), gradient_as_bucket_view=True)
        train(ddp, model.make_optimizer(), mine, forget=False)
        results["ddp"] = full(dict(model.named_parameters()))
        for kind in ("fsdp", "fsdp, norms of shards"):
            model = fresh()
            shard(model, model.regions(), mesh)
            optimizer = model.make_optimizer()
            if "norms" in kind:
                mars.norms = norms_here
            train(Objective(model), optimizer, mine)
            results[kind] = full(dict(model.named_parameters()))
        states = [s for s in optimizer.state.values() if "previous_grad" in s]
        assert states and all(s["previous_grad"].to_local().numel() < s["previous_grad"].numel() for s in states)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of two ended with."""
    return run(work, tmp_path_factory.mktemp("mars"))


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """What one rank ends with."""
    model = fresh()
    train(Objective(model), model.make_optimizer(), slice(0, RANKS))
    return full(dict(model.named_parameters()))


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def test_two_ranks_are_one(results: list[dict], alone: dict) -> None:
    for kind in ("ddp", "fsdp"):
        assert all(torch.equal(a, b) for a, b in zip(*(r[kind].values() for r in results), strict=True)), kind
        assert furthest(results[0][kind], alone) < 1e-5, kind
    assert furthest(results[0]["fsdp, norms of shards"], alone) > 1e-4


def test_without_correction_it_would_be_seen(alone: dict) -> None:
    model = fresh(gamma=0.0)
    train(Objective(model), model.make_optimizer(), slice(0, RANKS))
    assert furthest(dict(model.named_parameters()), alone) > 1e-3


def test_some_gradients_are_cut_and_others_are_not() -> None:
    model, seen = fresh(), []
    optimizer = model.make_optimizer()
    train(Objective(model), optimizer, slice(0, RANKS))
    for group in optimizer.param_groups:
        seen += [float(p.grad.norm()) for p in group["params"] if "gamma" in group]
    assert min(seen) < 0.8 and max(seen) > 1.2
