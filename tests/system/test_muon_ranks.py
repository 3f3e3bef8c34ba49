"""Muon on two ranks, DDP and FSDP2: what one rank does, the same bits on both, each matrix orthogonalised once."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import V, shake, tiny
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.optim import orthogonal
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.muon import Muon
from blagpt_pl.resume import number_by_model
from blagpt_pl.sharding import shard

STEPS, ROWS, LENGTH = 4, 3, 12
WHOLE = StateDictOptions(full_state_dict=True)


def fresh() -> nn.Module:
    """Three layers: of each shape an odd number of maps, so that the shares are not equal."""
    torch.manual_seed(0)
    muon = partial(Muon, lr=0.05, weight_decay=0.1)
    return shake(tiny(n_layers=3, optimizer=partial(Composite, matrix=muon, other=partial(torch.optim.AdamW, lr=3e-3))))


def data() -> Tensor:
    """(2 · steps, ranks, rows, length + 1) tokens."""
    return torch.randint(V, (2 * STEPS, RANKS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(objective: nn.Module, optimizer: torch.optim.Optimizer, ranks: slice, steps: slice) -> None:
    for rows in data()[steps, ranks].flatten(1, 2):
        optimizer.zero_grad()
        objective(rows[..., :-1], rows[..., 1:]).backward()
        optimizer.step()


def counting(counts: list[int]) -> Callable:
    """Newton-Schulz that writes down how many matrices it is given, those that only fill up left out."""
    original = orthogonal.newton_schulz

    def count(x: Tensor, steps: int) -> Tensor:
        counts.append(int((x != 0).any(-1).any(-1).sum()))
        return original(x, steps)

    return count


def work(rank: int, folder: Path) -> None:
    """One rank of two: train under both strategies, resume crosswise, and write down what came of it."""
    with joined(rank, folder) as (mesh, results):
        mine, first, second = slice(rank, rank + 1), slice(STEPS), slice(STEPS, 2 * STEPS)
        saved, counts = {}, []
        orthogonal.newton_schulz = counting(counts)
        for kind in ("ddp", "fsdp"):
            model = fresh()
            if kind == "fsdp":
                shard(model, model.regions(), mesh)
            optimizer = model.make_optimizer()
            objective = Objective(model)
            train(DistributedDataParallel(objective) if kind == "ddp" else objective, optimizer, mine, first)
            results[f"{kind}, made"] = torch.tensor(sum(counts))
            counts.clear()
            results[kind] = full(dict(model.named_parameters()))
            if kind == "ddp":
                saved = copy.deepcopy(optimizer.state_dict())
                number_by_model(saved, optimizer, list(model.parameters()))
                train(DistributedDataParallel(objective), optimizer, mine, second)
                results["ddp, on"] = full(dict(model.named_parameters()))
                counts.clear()
            else:
                results["fsdp, saved"] = get_optimizer_state_dict(model, optimizer, options=WHOLE)
                assert all(s["momentum_buffer"].to_local().numel() < s["momentum_buffer"].numel()
                           for s in optimizer.members["matrix"].state.values())  # fmt: skip
        model = fresh()
        model.load_state_dict(results["ddp"], strict=False)  # a tied head stands there once
        shard(model, model.regions(), mesh)
        optimizer = model.make_optimizer()
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
    return run(work, tmp_path_factory.mktemp("muon"))


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Tensor]]:
    """What one rank ends with, after half of the steps and after all."""
    model = fresh()
    optimizer = model.make_optimizer()
    found = {}
    for name, steps in (("half", slice(STEPS)), ("all", slice(STEPS, 2 * STEPS))):
        train(Objective(model), optimizer, slice(0, RANKS), steps)
        found[name] = full(dict(model.named_parameters()))
    return found


@pytest.mark.parametrize(
    ("kind", "as_one"), [("ddp", "half"), ("fsdp", "half"), ("ddp, on", "all"), ("ddp, on with fsdp", "all")]
)
def test_two_ranks_are_one(results: list[dict], alone: dict, kind: str, as_one: str) -> None:
    start = dict(fresh().named_parameters())
    matrices = {name for name, role in fresh().parameter_roles().items() if role == "matrix"}
    for name, p in alone[as_one].items():
        found = [result[kind][name] for result in results]
        assert torch.equal(*found), name
        assert (found[0] - p).abs().max() < 1e-6, name
        assert name not in matrices or (p - start[name]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_each_matrix_is_orthogonalised_once(results: list[dict], kind: str) -> None:
    made = [int(result[f"{kind}, made"]) for result in results]
    maps = 3 * 7  # q, k, v, out, gate, up, down
    assert sum(made) == STEPS * maps
    assert max(made) <= STEPS * (maps // 2 + 2)


def test_a_sharded_state_is_saved_whole(results: list[dict]) -> None:
    shapes = {name: p.shape for name, p in fresh().named_parameters()}
    for name, state in results[0]["fsdp, saved"]["state"].items():
        for key in state.keys() & {"momentum_buffer", "exp_avg"}:
            assert state[key].shape == shapes[name]
