"""Every architecture of configs/models/ on two ranks, DDP and FSDP2, is what it is on one."""

from pathlib import Path

import pytest
import torch
from helpers import shake
from overlaid import LENGTHS, built, merged
from ranks import RANKS, Objective, full, joined, run
from shipped import MODELS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.lm import LanguageModel
from blagpt_pl.sharding import shard

STEPS, ROWS = 3, 2


SHARED = "zamba2, one block at two depths"  # whose parameters FSDP2 gathers twice; tiny, the shipped one uses each block once
NAMES = (*MODELS, SHARED)


def fresh(name: str) -> LanguageModel:
    tree = merged(model=name.partition(",")[0])
    if name == SHARED:
        tree["model"]["init_args"]["n_shared"] = 1
    return shake(built(tree)).train()


def train(objective: nn.Module, model: LanguageModel, ranks: slice) -> dict[str, Tensor]:
    shape = (STEPS, RANKS, ROWS, LENGTHS[1] + 1)
    data = torch.randint(model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    # eps: a gradient that is 0 but for rounding, such as that of Rene's bias of keys, moves nothing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    for step in range(STEPS):
        rows = data[step, ranks].flatten(0, 1)
        optimizer.zero_grad()
        objective(rows[..., :-1], rows[..., 1:]).backward()
        optimizer.step()
    return full(dict(model.named_parameters()))


def work(rank: int, folder: Path) -> None:
    with joined(rank, folder) as (mesh, results):
        mine = slice(rank, rank + 1)
        for name in NAMES:
            model = fresh(name)
            results[name, "ddp"] = train(DistributedDataParallel(Objective(model)), model, mine)
            model = fresh(name)
            shard(model, model.regions(), mesh)
            results[name, "fsdp"] = train(Objective(model), model, mine)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of two ended with."""
    return run(work, tmp_path_factory.mktemp("models"))


def test_two_ranks_are_one(results: list[dict]) -> None:
    """One test, so that the ranks run once, however many processes share the tests."""
    for name in NAMES:
        start = {n: p.detach().clone() for n, p in fresh(name).named_parameters()}
        model = fresh(name)
        one = train(Objective(model), model, slice(0, RANKS))
        for kind in ("ddp", "fsdp"):
            for n, p in one.items():
                found = [result[name, kind][n] for result in results]
                assert torch.equal(*found), (name, kind, n)
                moved = (p - start[n]).abs().mean()
                assert moved > 0, (name, kind, n)
                assert (found[0] - p).abs().mean() <= 1e-3 * moved + 1e-7, (name, kind, n)
