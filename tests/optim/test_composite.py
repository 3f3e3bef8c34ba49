"""Composite: two optimizers that look like one: groups, schedules, closures, checkpoints, clipping."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import adamw, batch, tiny
from torch import nn
from torch.nn import Parameter

from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.muon import Muon
from blagpt_pl.optim.schedule import Trapezoid
from blagpt_pl.resume import number_by_model

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
KINDS = {
    "Muon and AdamW": (Muon, adamw),
    "SGD and fused AdamW": (SGD, partial(adamw, fused=True)),
    "SGD twice": (SGD, SGD),
}


def pair(matrix: Callable = Muon, other: Callable = adamw) -> tuple[nn.Module, Composite]:
    model = tiny(optimizer=partial(Composite, matrix=matrix, other=other))
    return model, model.make_optimizer()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 0) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model.objective(*batch(model, seed=seed + step))[0].backward()
        optimizer.step()


def alike(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
def test_it_is_its_two_members(kinds: tuple) -> None:
    torch.manual_seed(0)
    model, optimizer = pair(*kinds)
    twin = copy.deepcopy(model)
    groups = twin.make_optimizer().param_groups
    split = [[{"params": g["params"], "weight_decay": g["weight_decay"], **({"splits": g["splits"]} if m else {})}
              for g in groups if (g["role"] == "matrix") == m] for m in (True, False)]  # fmt: skip
    parts = [kind(given) for kind, given in zip(kinds, split, strict=True)]
    for step in range(3):
        learn(model, optimizer, 1, step)
        twin.zero_grad()
        twin.objective(*batch(twin, seed=step))[0].backward()
        for part in parts:
            part.step()
    assert alike(model, twin)


def test_groups_and_states_are_the_members_own() -> None:
    model, optimizer = pair()
    assert [g["role"] for g in optimizer.param_groups] == ["matrix", "embedding", "vector"]
    owned = [g for member in optimizer.members.values() for g in member.param_groups]
    assert all(any(g is o for o in owned) for g in optimizer.param_groups)
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 3e-3, 3e-3]
    assert len(optimizer.state) == 0
    learn(model, optimizer)
    assert set(optimizer.state) == set(model.parameters())
    assert len(optimizer.state) == len(list(model.parameters()))
    matrix, vector = optimizer.param_groups[0]["params"][0], optimizer.param_groups[2]["params"][0]
    assert set(optimizer.state[matrix]) == {"momentum_buffer"}
    assert optimizer.state[vector] is optimizer.members["other"].state[vector]
    optimizer.state[vector] = {"exp_avg": 1}
    assert optimizer.members["other"].state[vector] == {"exp_avg": 1}
    assert "no such key" not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_a_schedule_scales_each_learning_rate() -> None:
    model, optimizer = pair()
    scheduler = Trapezoid(10, warmup=4, warmdown=4).on(optimizer)
    seen = []
    for _ in range(10):
        seen.append([g["lr"] for g in optimizer.param_groups])
        learn(model, optimizer, 1)
        scheduler.step()
    assert [one[0] / 0.02 for one in seen] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert all(one[0] / 0.02 == pytest.approx(one[1] / 3e-3) == pytest.approx(one[2] / 3e-3) for one in seen)


def test_a_closure_runs_once_with_gradients_before_both() -> None:
    model, optimizer = pair()
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model.objective(*batch(model))[0]
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        assert optimizer.step(closure).requires_grad
    assert calls == [True]
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True) if p.grad.abs().sum() > 0)


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("by", ["number", "place", "name"])
def test_saved_and_loaded_it_goes_on_bit_by_bit(kinds: tuple, by: str) -> None:
    model, optimizer = pair(*kinds)
    learn(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [n for g in saved["param_groups"] for n in g["params"]] == list(range(len(list(model.parameters()))))
    if by == "place":
        number_by_model(saved, optimizer, list(model.parameters()))
    if by == "name":  # as FSDP2 loads them
        ours = [p for g in optimizer.param_groups for p in g["params"]]
        names = {id(p): f"matrix.{name}" for name, p in model.named_parameters()}
        saved["state"] = {names[id(ours[n])]: value for n, value in saved["state"].items()}
        for g in saved["param_groups"]:
            g["params"] = [names[id(ours[n])] for n in g["params"]]
    twin = copy.deepcopy(model)
    other = twin.make_optimizer()
    for g in other.param_groups:
        g["lr"] = 17.0
    other.load_state_dict(saved)
    owned = [g for member in other.members.values() for g in member.param_groups]
    assert all(any(g is o for o in owned) for g in other.param_groups)
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    for m, o in ((model, optimizer), (twin, other)):
        learn(m, o, seed=5)
    assert alike(model, twin)


class Counting(torch.optim.SGD):
    """Has state of its own beside that of the parameters, as some libraries' optimizers do."""

    def __init__(self, params: object, start: int) -> None:
        super().__init__(params, lr=0.1)
        self.state["count"] = {"n": start}


def test_state_of_no_parameter_stays_with_its_member() -> None:
    _, optimizer = pair(partial(Counting, start=3), partial(Counting, start=5))
    _, other = pair(partial(Counting, start=0), partial(Counting, start=0))
    other.load_state_dict(optimizer.state_dict())
    assert [member.state["count"]["n"] for member in other.members.values()] == [3, 5]


def test_a_group_more_goes_where_its_role_says() -> None:
    _, optimizer = pair()
    for role, shape, owner in (("matrix", (3, 4), "matrix"), ("vector", (3,), "other")):
        p = Parameter(torch.ones(shape))
        optimizer.add_param_group({"params": [p], "role": role, "lr": 0.5})
        assert optimizer.param_groups[-1] is optimizer.members[owner].param_groups[-1]
        assert (optimizer.param_groups[-1]["role"], optimizer.param_groups[-1]["lr"]) == (role, 0.5)
        p.grad = torch.ones(shape)
        optimizer.step()
        assert not torch.equal(p, torch.ones(shape))
    assert len(optimizer.state_dict()["param_groups"]) == 5
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p], "role": "vector"})


def test_what_matches_nothing_is_an_error() -> None:
    groups = {role: {"params": [Parameter(torch.ones(2, 2))], "role": role} for role in ("matrix", "head")}
    with pytest.raises(ValueError, match=r"Composite.matrix: matches no parameter \(the roles of this model: head\)"):
        Composite([groups["head"]], SGD, SGD)
    with pytest.raises(ValueError, match=r"Composite.other: matches no parameter"):
        Composite([groups["matrix"]], SGD, SGD)
    with pytest.raises(ValueError, match="without a role"):
        Composite([Parameter(torch.ones(2))], SGD, SGD)
    with pytest.raises(ValueError, match="has 3 parameter groups .expected 2"):
        Composite(list(groups.values()), SGD, SGD).load_state_dict(pair()[1].state_dict())


def test_a_member_that_regroups_is_refused() -> None:
    def merged(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.1)

    with pytest.raises(ValueError, match=r"Composite.other: SGD makes 1 groups of 2"):
        pair(SGD, merged)


def test_clipping_sees_all_gradients() -> None:
    model, optimizer = pair()
    model.objective(*batch(model))[0].backward()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    nn.utils.clip_grad_norm_(params, 1e-3)
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) <= 1.001e-3


def test_a_copy_goes_on_by_itself() -> None:
    """Also where a scheduler has wrapped the original's `step`."""
    model, optimizer = pair()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    learn(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    learn(twin_model, twin, 2, seed=2)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    learn(model, optimizer, 2, seed=2)
    assert alike(model, twin_model) and not torch.equal(before[0], next(model.parameters()))
