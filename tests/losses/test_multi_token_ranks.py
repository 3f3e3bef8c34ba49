"""Two ranks, DDP and FSDP2, train heads that make their gradients in the forward pass as one rank does."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import V, shake, tiny
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.sharding import shard, without_sync

STEPS, MICRO, ROWS, LENGTH = 3, 2, 2, 12  # each step: two micro-batches a rank, two sequences each


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return shake(tiny(losses=[partial(MultiToken, n=3), ZLoss], token_bias=True)).double()


def data() -> Tensor:
    """(steps, micro-batches, ranks, rows, length + 1) tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (STEPS, MICRO, RANKS, ROWS, LENGTH + 1), generator=generator)


def train(model: nn.Module, ranks: slice, kind: str = "one") -> dict[str, Tensor]:
    """The weights after all steps on the sequences of these ranks."""
    objective = Objective(model)
    if kind == "ddp":
        objective = DistributedDataParallel(objective)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in data()[:, :, ranks].flatten(2, 3):
        optimizer.zero_grad()
        for micro, rows in enumerate(step):
            alone = objective.no_sync() if kind == "ddp" else without_sync(model)
            with alone if micro < MICRO - 1 else torch.enable_grad():
                (objective(rows[:, :-1], rows[:, 1:]) / MICRO).backward()
        optimizer.step()
    return full(dict(model.named_parameters()))


def work(rank: int, folder: Path) -> None:
    """One rank of two: train with both strategies, and write down what came out and what each held."""
    with joined(rank, folder) as (mesh, results):
        for kind in ("ddp", "fsdp"):
            model = fresh()
            if kind == "fsdp":
                shard(model, model.regions(), mesh)
                assert all(p.to_local().numel() < p.numel() for p in model.losses.parameters())
            results[kind] = train(model, slice(rank, rank + 1), kind)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of two ended with, by strategy."""
    return run(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_are_one(results: list[dict], kind: str) -> None:
    start = dict(fresh().named_parameters())
    alone = train(fresh(), slice(0, RANKS))
    for result in results:
        assert result[kind].keys() == alone.keys()
        assert max((result[kind][name] - p).abs().max() for name, p in alone.items()) < 1e-12
    assert min((p - start[name]).abs().max() for name, p in alone.items()) > 1e-6
