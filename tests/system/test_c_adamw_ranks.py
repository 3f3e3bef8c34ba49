"""CAdamW on shards: the mean is over whole tensors, and one all-reduce a group tells it."""

from pathlib import Path

import pytest
import torch
from ranks import joined, run
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter

from blagpt_pl.optim.c_adamw import CAdamW

SHAPES = ((5, 4), (1, 6), (7,), (2, 3, 2))  # uneven shards, and one rank without any
STEPS = 6


def tensors(seed: int) -> list[Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=dice, dtype=torch.float64) for shape in SHAPES]


def grouped(params: list[Parameter]) -> CAdamW:
    return CAdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=0.05, weight_decay=0.1)


def work(rank: int, folder: Path) -> None:
    with joined(rank, folder) as (mesh, results):
        line = mesh["data_parallel"]
        params = [Parameter(distribute_tensor(t, line, [Shard(0)])) for t in tensors(0)]
        optimizer, calls = grouped(params), []
        for step in range(STEPS):
            for p, g in zip(params, tensors(1 + step), strict=True):
                p.grad = distribute_tensor(g, line, [Shard(0)])
            with CommDebugMode() as seen:
                optimizer.step()
            calls.append({str(op).split(".")[-1]: n for op, n in seen.get_comm_counts().items()})
        results["calls"] = calls
        results["params"] = [p.full_tensor().detach() for p in params]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(work, tmp_path_factory.mktemp("c_adamw"))


def test_shards_are_one_tensor(results: list[dict]) -> None:
    params = [Parameter(t) for t in tensors(0)]
    optimizer = grouped(params)
    for step in range(STEPS):
        for p, g in zip(params, tensors(1 + step), strict=True):
            p.grad = g
        optimizer.step()
    for one, other, p in zip(results[0]["params"], results[1]["params"], params, strict=True):
        assert torch.equal(one, other)
        assert (one - p).abs().max() < 1e-12


def test_one_all_reduce_a_group(results: list[dict]) -> None:
    assert all(sum(calls.values()) == 2 and set(calls) == {"all_reduce"} for calls in results[0]["calls"])
