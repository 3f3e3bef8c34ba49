"""What each tensor is, and the groups that follow from it."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from helpers import D, T, V, tiny, tiny_gpt2
from torch import nn
from torch.nn import Parameter

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import count
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.roles import roles_of
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.roles import OWN, ROLES, groups_by_role, scale_learning_rates
from blagpt_pl.optim.schedule import Constant


def groups_of(model: nn.Module) -> dict[str, dict]:
    return {group["role"]: group for group in groups_by_role(model.named_parameters(), model.parameter_roles())}


@pytest.mark.parametrize(
    "build", [tiny, tiny_gpt2, partial(tiny, head=LinearHead), partial(tiny_gpt2, head=partial(LinearHead, bias=True))]
)
def test_every_parameter_is_in_exactly_one_group(build: partial) -> None:
    model = build()
    members = [id(p) for group in groups_of(model).values() for p in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in model.parameters()}
    assert sum(count(group["params"]) for group in groups_of(model).values()) == count(model.parameters())


def test_roles_of_the_baseline() -> None:
    groups = groups_of(tiny())
    assert list(groups) == ["matrix", "embedding", "vector"]  # a tied head is no head of its own
    assert [p.shape for p in groups["embedding"]["params"]] == [(V, D)]
    assert all(p.ndim == 2 for p in groups["matrix"]["params"])
    assert len(groups["matrix"]["params"]) == 2 * 4  # qkv, out, gate_up, down
    assert all(p.ndim == 1 for p in groups["vector"]["params"])
    assert len(groups["vector"]["params"]) == 2 * 4 + 1  # two norms and two QK-norms a block, one norm after them


def test_roles_of_gpt2_with_a_head_of_its_own() -> None:
    groups = groups_of(tiny_gpt2(head=partial(LinearHead, bias=True)))
    assert list(groups) == [role for role in ROLES if role not in OWN]
    assert sorted(p.shape for p in groups["embedding"]["params"]) == [(T, D), (V, D)]
    assert [p.shape for p in groups["head"]["params"]] == [(V, D)]
    assert (V,) in [p.shape for p in groups["vector"]["params"]]  # the head's bias


def test_roles_follow_what_a_tensor_is_not_its_name() -> None:
    class Renamed(BlaGPT):
        def __init__(self, **arguments: object) -> None:
            super().__init__(**arguments)
            self.embedding_scale = Parameter(torch.ones(D))
            self.head_norm_bias_weight = nn.Linear(D, D, bias=False)
            self.matrix = nn.Embedding(5, D)
            self.tensor = Parameter(torch.zeros(2, 3, 4))
            self.scalar = Parameter(torch.zeros(()))

    arguments = {"vocab_size": V, "context": T, "d_model": D, "n_layers": 1, "head": LinearHead}
    base = tiny(**arguments)
    roles = Renamed(
        **arguments, block=lambda site: base.blocks[0], norm=lambda dim: base.norm, init=lambda model, site: None,
        optimizer=None, schedule=None,
    ).parameter_roles()  # fmt: skip
    assert roles["embedding_scale"] == roles["scalar"] == "vector"
    assert roles["head_norm_bias_weight.weight"] == roles["tensor"] == "matrix"
    assert roles["matrix.weight"] == "embedding"


def test_weight_decay_acts_on_matrices_alone() -> None:
    model = tiny_gpt2(head=LinearHead)
    optimizer = torch.optim.AdamW(
        groups_by_role(model.named_parameters(), model.parameter_roles()), lr=0.1, weight_decay=0.5
    )
    assert {group["role"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "matrix": 0.5, "embedding": 0.0, "head": 0.0, "vector": 0.0,
    }  # fmt: skip
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    roles = model.parameter_roles()
    for name, p in model.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if roles[name] == "matrix" else before[name]
        assert torch.allclose(p, expected, atol=1e-9), name


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = tiny()
    model.blocks[0].requires_grad_(False)
    members = {id(p) for group in groups_of(model).values() for p in group["params"]}
    assert members == {id(p) for p in model.parameters() if p.requires_grad}


def test_groups_come_in_one_order() -> None:
    parameters = [(role, Parameter(torch.zeros(1))) for role in reversed(ROLES)]
    assert [group["role"] for group in groups_by_role(parameters, {role: role for role in ROLES})] == list(ROLES)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"a": "matrix"}, r"no role for b \(and 1 more\)"),
        ({"a": "matrix", "b": "vector", "c": "bias"}, "unknown role 'bias'.*matrix, embedding, head, vector"),
        ({"a": "matrix", "b": "vector", "c": "vector", "d": "vector"}, "d .*is no parameter"),
    ],
)
def test_a_mistake_is_told(roles: dict[str, str], message: str) -> None:
    named = [(name, Parameter(torch.zeros(1))) for name in "abc"]
    with pytest.raises(ValueError, match=message):
        groups_by_role(iter(named), roles)


# ---------------------------------------------------------------------- what drives a recurrence


class Recurrent(nn.Module):
    """Says what its own parameters are, and nothing of those within."""

    roles: ClassVar[dict[str, str]] = {"A_log": "recurrence", "low_rank": "recurrence", "w0": "timescale"}

    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.low_rank, self.w0 = (Parameter(torch.ones(s)) for s in ((3,), (3, 2), (3,)))
        self.gain, self.kernel = Parameter(torch.ones(3)), Parameter(torch.ones(3, 2))
        self.within = nn.Linear(2, 3)


def test_a_module_says_what_its_own_parameters_are() -> None:
    model = nn.ModuleDict({"mixer": Recurrent(), "head": nn.Linear(3, 5)})
    found = roles_of(model, model["head"])
    assert {name.removeprefix("mixer."): role for name, role in found.items() if "mixer" in name} == {
        "A_log": "recurrence",
        "low_rank": "recurrence",
        "w0": "timescale",
        "gain": "vector",
        "kernel": "matrix",
        "within.weight": "matrix",
        "within.bias": "vector",
    }
    groups = {g["role"]: g for g in groups_by_role(model.named_parameters(), found)}
    assert list(groups) == list(dict.fromkeys(r for r in ROLES if r != "embedding"))
    assert groups["recurrence"]["weight_decay"] == groups["timescale"]["weight_decay"] == 0.0
    assert "weight_decay" not in groups["matrix"]


@pytest.mark.parametrize("composite", [False, True])
def test_a_timescale_learns_twice_as_fast_under_any_schedule(composite: bool) -> None:
    model = nn.ModuleDict({"mixer": Recurrent(), "head": nn.Linear(3, 5)})
    groups = groups_by_role(model.named_parameters(), roles_of(model, model["head"]))
    sgd = partial(torch.optim.SGD, lr=0.5)
    optimizer = Composite(groups, matrix=partial(sgd, lr=0.1), other=sgd) if composite else sgd(groups)
    scale_learning_rates(optimizer)
    scheduler = Constant(10, warmup=4).on(optimizer)
    for step in range(1, 6):
        rates = {group["role"]: group["lr"] for group in optimizer.param_groups}
        assert rates["timescale"] == pytest.approx(2 * rates["recurrence"])
        assert rates["recurrence"] == pytest.approx(rates["vector"]) == pytest.approx(0.5 * min(step / 4, 1))
        before = model["mixer"].w0.detach().clone(), model["mixer"].A_log.detach().clone()
        (model["mixer"].w0.sum() + model["mixer"].A_log.sum()).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        moved = before[0] - model["mixer"].w0, before[1] - model["mixer"].A_log
        assert torch.allclose(moved[0], 2 * moved[1])
