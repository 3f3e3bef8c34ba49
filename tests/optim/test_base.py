"""What `GroupOptimizer` gives every optimizer of the house: copies, counts and values that are a parameter's own."""

import copy
import pickle
from functools import partial

import pytest
import torch
from quadratic import Factory, gradients, parameters
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from blagpt_pl.optim.adam_mini import AdamMini
from blagpt_pl.optim.adamw_independent import AdamWIndependent
from blagpt_pl.optim.ademamix import AdEMAMix
from blagpt_pl.optim.adopt import ADOPT
from blagpt_pl.optim.c_adamw import CAdamW
from blagpt_pl.optim.demo import DeMo
from blagpt_pl.optim.mars import MARS
from blagpt_pl.optim.muon import Muon
from blagpt_pl.optim.soap import SOAP

KINDS = [ADOPT, AdEMAMix, AdamMini, AdamWIndependent, CAdamW, DeMo, MARS, Muon, SOAP]
SHAPES = ((12, 8), (6, 4), (4, 4))
every = pytest.mark.parametrize("kind", [partial(k, lr=0.01) for k in KINDS], ids=[k.__name__ for k in KINDS])


def made(kind: Factory) -> tuple[Optimizer, list[Parameter]]:
    params = parameters(shapes=SHAPES)
    return kind(params), params


def walk(optimizer: Optimizer, params: list[Parameter], steps: range, idle: tuple = ()) -> None:
    for step in steps:
        for i, (p, grad) in enumerate(zip(params, gradients(params, step), strict=True)):
            p.grad = None if (i, step) in idle else grad
        optimizer.step()


def same(one: list[Parameter], other: list[Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@every
def test_a_copy_goes_on_by_itself(kind: Factory) -> None:
    """Also where a scheduler has wrapped the original's `step`."""
    optimizer, params = made(kind)
    LambdaLR(optimizer, lambda step: 1.0)
    walk(optimizer, params, range(3))
    twin = copy.deepcopy(optimizer)
    copies = twin.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    walk(twin, copies, range(3, 6))
    assert same(params, before)
    assert not any(torch.equal(a, b) for a, b in zip(copies, before, strict=True))
    walk(optimizer, params, range(3, 6))
    assert same(params, copies)


@every
def test_a_state_replaces_one_that_is_there(kind: Factory) -> None:
    optimizer, params = made(kind)
    walk(optimizer, params, range(4))
    other, others = made(kind)
    walk(other, others, range(9))
    with torch.no_grad():
        torch._foreach_copy_(others, params)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    walk(optimizer, params, range(4, 8))
    walk(other, others, range(4, 8))
    assert same(params, others)


@every
def test_a_parameter_that_misses_steps_is_as_if_alone(kind: Factory) -> None:
    """In one group with others, or in one of its own."""
    idle = {(1, 0), (1, 1), (2, 3), (0, 5)}
    optimizer, params = made(kind)
    walk(optimizer, params, range(9), idle)
    apart = parameters(shapes=SHAPES)
    walk(kind([{"params": [p]} for p in apart]), apart, range(9), idle)
    assert max(float((a - b).detach().abs().max()) for a, b in zip(params, apart, strict=True)) < 1e-12


@every
def test_a_group_that_is_refused_leaves_nothing(kind: Factory) -> None:
    optimizer, _ = made(kind)
    with pytest.raises(ValueError, match=r"lr: -1"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2, 2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_one_with_a_scheduler_can_be_pickled() -> None:
    optimizer, params = made(partial(ADOPT, lr=0.01))
    LambdaLR(optimizer, lambda step: 1.0)
    walk(optimizer, params, range(3))
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(("kind", "name"), [(ADOPT, "exp_avg_sq"), (AdEMAMix, "exp_avg_slow")])
def test_a_slow_mean_decays_beside_bfloat16_weights(kind: type, name: str) -> None:
    """0.9999 of a bfloat16 number is itself; so the mean is float32, also after it has been saved."""
    params = [Parameter(torch.ones(4, 3, dtype=torch.bfloat16))]
    optimizer = kind(params, lr=1e-3)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    other = kind([Parameter(torch.ones(4, 3, dtype=torch.bfloat16))], lr=1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p = other.param_groups[0]["params"][0]
    before = other.state[p][name].clone()
    assert before.dtype == torch.float32 and before.abs().min() > 0
    p.grad = torch.zeros_like(p)
    other.step()
    assert torch.equal(other.state[p][name], before * 0.9999)


@every
@pytest.mark.parametrize(("saved", "loaded"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_state_fits_weights_of_another_precision(kind: Factory, saved: torch.dtype, loaded: torch.dtype) -> None:
    """It is taken up in the precision that it would have been made in."""
    states = []
    for dtype in (saved, loaded):
        params = parameters(dtype, SHAPES)
        optimizer = kind(params)
        walk(optimizer, params, range(2))
        states.append(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(states[0]))
    for p, own in zip(params, states[1]["state"].values(), strict=True):
        found = optimizer.state[p]
        assert {n: x.dtype for n, x in found.items()} == {
            n: x[0].dtype if n == "delta" else x.dtype for n, x in own.items()
        }
    walk(optimizer, params, range(2, 4))
    assert all(p.isfinite().all() for p in params)
