"""Adam-mini on two ranks, DDP and FSDP2: what one rank does; a head that a shard cuts has one second moment on both."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import V, attention, block, shake, tiny
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.optim.adam_mini import AdamMini
from blagpt_pl.resume import number_by_model
from blagpt_pl.sharding import shard

STEPS, ROWS, LENGTH = 4, 3, 12
WHOLE = StateDictOptions(full_state_dict=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # as Lightning reads a single file


def fresh() -> nn.Module:
    """Heads of 10 rows, (30 + 10 + 10) rows of q, k and v: the shards of 25 rows cut the third head of the queries."""
    torch.manual_seed(0)
    heads = attention(n_heads=3, n_kv_heads=1, head_dim=10, qkv_bias=True, out_bias=True)
    return shake(tiny(block=block(attention=heads), optimizer=partial(AdamMini, lr=3e-3, weight_decay=0.1)))


def data() -> Tensor:
    """(2 · steps, ranks, rows, length + 1) tokens."""
    return torch.randint(V, (2 * STEPS, RANKS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(objective: nn.Module, optimizer: torch.optim.Optimizer, ranks: slice, steps: slice) -> None:
    for rows in data()[steps, ranks].flatten(1, 2):
        optimizer.zero_grad()
        objective(rows[..., :-1], rows[..., 1:]).backward()
        optimizer.step()


def sharded(mesh: object, weights: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = fresh()
    if weights is not None:
        model.load_state_dict(weights, strict=False)  # a tied head stands there once
    shard(model, model.regions(), mesh)
    return model, model.make_optimizer()


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}


def work(rank: int, folder: Path) -> None:
    """One rank of two: train under both strategies, resume crosswise, and write down what came of it."""
    with joined(rank, folder) as (mesh, results):
        mine, first, second = slice(rank, rank + 1), slice(STEPS), slice(STEPS, 2 * STEPS)
        model = fresh()
        optimizer = model.make_optimizer()
        ddp = DistributedDataParallel(Objective(model))
        train(ddp, optimizer, mine, first)
        results["ddp"], results["ddp, moments"] = full(dict(model.named_parameters())), moments(model, optimizer)
        saved = copy.deepcopy(optimizer.state_dict())
        number_by_model(saved, optimizer, list(model.parameters()))

        model, optimizer = sharded(mesh)
        assert any(p.to_local().shape[0] % 10 for name, p in model.named_parameters() if name.endswith("qkv.weight"))
        train(Objective(model), optimizer, mine, first)
        results["fsdp"], results["fsdp, moments"] = full(dict(model.named_parameters())), moments(model, optimizer)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))
        train(Objective(model), optimizer, mine, second)
        results["fsdp, on"] = full(dict(model.named_parameters()))

        model, optimizer = sharded(mesh, results["fsdp"])
        set_optimizer_state_dict(model, optimizer, state, options=FROM_FIRST)
        train(Objective(model), optimizer, mine, second)
        results["fsdp, resumed"] = full(dict(model.named_parameters()))

        model, optimizer = sharded(mesh, results["ddp"])
        names = dict(enumerate(name for name, _ in model.named_parameters()))
        by_name = {
            "state": {names[n]: value for n, value in saved["state"].items()},
            "param_groups": [{**g, "params": [names[n] for n in g["params"]]} for g in saved["param_groups"]],
        }
        set_optimizer_state_dict(model, optimizer, by_name, options=WHOLE)
        train(Objective(model), optimizer, mine, second)
        results["ddp, on with fsdp"] = full(dict(model.named_parameters()))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of two ended with."""
    return run(work, tmp_path_factory.mktemp("adam-mini"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one rank ends with, after half of the steps and after all, and its second moments."""
    model = fresh()
    optimizer = model.make_optimizer()
    found = {}
    for name, steps in (("half", slice(STEPS)), ("all", slice(STEPS, 2 * STEPS))):
        train(Objective(model), optimizer, slice(0, RANKS), steps)
        found[name] = full(dict(model.named_parameters()))
        found[f"{name}, moments"] = moments(model, optimizer)
    return found


@pytest.mark.parametrize(
    ("kind", "as_one"), [("ddp", "half"), ("fsdp", "half"), ("fsdp, on", "all"), ("ddp, on with fsdp", "all")]
)
def test_two_ranks_are_one(results: list[dict], alone: dict, kind: str, as_one: str) -> None:
    start = dict(fresh().named_parameters())
    for name, p in alone[as_one].items():
        found = [result[kind][name] for result in results]
        assert torch.equal(*found), name
        assert (found[0] - p).abs().max() < 2e-6, name
        assert (p - start[name]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_second_moments_are_whole_and_equal_on_both(results: list[dict], alone: dict, kind: str) -> None:
    for name, v in alone["half, moments"].items():
        found = [result[f"{kind}, moments"][name] for result in results]
        assert torch.equal(*found), name
        assert torch.allclose(found[0], v, rtol=1e-4, atol=0), name
    assert alone["half, moments"]["blocks.0.attention.part.qkv.weight"].shape == (3 + 1 + 10,)


def test_resumed_from_a_whole_file_it_goes_on_bit_by_bit(results: list[dict]) -> None:
    for result in results:
        assert all(torch.equal(p, result["fsdp, resumed"][name]) for name, p in result["fsdp, on"].items())
