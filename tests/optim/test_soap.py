"""SOAP: equal to the loop over matrices, to two other codes where they are right; map by map; what it keeps; refusals."""

import io
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import tiny
from naive_soap import soap_naive
from promises import learn
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch.nn import Parameter

import blagpt_pl.optim.heavy  # noqa: F401  so that heavyball does not compile itself
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.soap import SOAP, PaLMForeachSOAP

SHAPES = ((8, 8), (12, 8), (5, 9))
SQUARE = ((8, 8),)
VALUES = {"lr": 0.03, "betas": (0.9, 0.95), "eps": 1e-12}


def naive(shapes: tuple = SHAPES, dtype: torch.dtype = torch.float64, **values: object) -> list:
    """The trajectory of `soap_naive`."""
    params, seen = parameters(dtype, shapes), []
    states: list[dict] = [{} for _ in params]
    values = {"shampoo_beta": 0.95, **VALUES, **values}
    for step in range(STEPS):
        for p, g, state in zip(params, gradients(params, step), states, strict=True):
            p.data = soap_naive(p.detach(), g, state, step + 1, **values)
        seen.append([p.detach().clone() for p in params])
    return seen


@pytest.mark.parametrize("palm", [False, True])
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_it_is_the_loop_over_matrices(palm: bool, every: int, weight_decay: float) -> None:
    shared = {"palm": palm, "weight_decay": weight_decay}
    found = trajectory(partial(SOAP, **VALUES, **shared, precondition_frequency=every), shapes=SHAPES)
    assert gap(found, naive(**shared, every=every)) < 1e-10
    assert gap(found, naive(**shared, every=every, permuted=False)) < 1e-10
    assert gap(found, naive(weight_decay=weight_decay, palm=not palm, every=every)) > 1e-3
    assert gap(found, naive(**shared, every=every + 1)) > 1e-3


def test_the_first_step_only_looks() -> None:
    found = trajectory(partial(SOAP, **VALUES, weight_decay=0.1), steps=1, shapes=SHAPES)
    assert gap(found, [[p.detach() for p in parameters(shapes=SHAPES)]]) == 0


def test_sides_that_are_too_long_keep_the_identity() -> None:
    found = trajectory(partial(SOAP, **VALUES, precondition_frequency=3, max_precond_dim=8), shapes=SHAPES)
    assert gap(found, naive(every=3, longest=8)) < 1e-10
    assert gap(found, naive(every=3)) > 1e-3
    params = parameters(shapes=((12, 8),))
    optimizer = SOAP(params, max_precond_dim=8)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    sizes = {k: tuple(v.shape) for k, v in optimizer.state[params[0]].items()}
    assert sizes == {"step": (), "exp_avg": (12, 8), "exp_avg_sq": (12, 8), "moments_columns_0": (8, 8), "basis_columns_0": (8, 8)}  # fmt: skip


def test_it_is_the_authors_as_another_library_has_it() -> None:
    other = pytest.importorskip("pytorch_optimizer").SOAP
    values = {"lr": 0.03, "betas": (0.95, 0.95), "precondition_frequency": 10, "weight_decay": 0.0}
    theirs = trajectory(partial(other, **values), shapes=SQUARE)
    assert gap(trajectory(partial(SOAP, **values), shapes=SQUARE), theirs) < 1e-5  # its decompositions are in float32


@pytest.mark.parametrize("palm", [False, True])
def test_it_is_heavyballs(palm: bool) -> None:
    """Which is float32 inside. It counts the steps to the next basis from another one: with one a step, that is the same."""
    heavyball = pytest.importorskip("heavyball")
    values = {"lr": 3e-3, "betas": (0.9, 0.95), "precondition_frequency": 1, "weight_decay": 0.1, "palm": palm}
    theirs = trajectory(partial(heavyball.SOAP, **values), shapes=SQUARE, dtype=torch.float32)
    assert gap(trajectory(partial(SOAP, **values), shapes=SQUARE), theirs) < 4e-4
    assert gap(trajectory(partial(SOAP, **(values | {"palm": not palm})), shapes=SQUARE), theirs) > 1e-3


def test_palm_soap_by_its_old_name() -> None:
    named = trajectory(PaLMForeachSOAP, shapes=SHAPES)
    values = {"betas": (0.9, 0.95), "weight_decay": 0.01, "precondition_frequency": 2, "palm": True}
    assert gap(named, trajectory(partial(SOAP, **values), shapes=SHAPES)) == 0


def test_a_turned_problem_is_solved_by_turned_steps() -> None:
    """What Adam cannot: with both sides in their bases, the coordinates do not matter, as long as the bases are determined."""
    turns = [torch.linalg.qr(w.detach())[0] for w in parameters(shapes=((8, 8), (8, 8)))]

    def run(build: Callable, turn: Callable) -> torch.Tensor:
        p = Parameter(turn(parameters(shapes=SQUARE)[0].detach()))
        optimizer = build([p])
        for step in range(STEPS):
            p.grad = turn(gradients(parameters(shapes=SQUARE), step)[0])
            optimizer.step()
        return p.detach()

    def apart(build: Callable) -> float:
        plain = turns[0] @ run(build, lambda x: x) @ turns[1].T
        return float((run(build, lambda x: turns[0] @ x @ turns[1].T) - plain).abs().max())

    assert apart(partial(SOAP, **VALUES)) < 1e-9
    assert apart(partial(torch.optim.Adam, lr=0.03)) > 1e-2


def test_a_stacked_matrix_is_taken_map_by_map() -> None:
    shapes = ((8, 8), (4, 8), (4, 8))
    apart = parameters(shapes=shapes)
    stacked = Parameter(torch.cat([p.detach() for p in apart]))
    values = VALUES | {"precondition_frequency": 3}
    optimizers = SOAP(apart, **values), SOAP([{"params": [stacked], "role": "matrix", "splits": [(8, 4, 4)]}], **values)
    for step in range(STEPS):
        for p, g in zip(apart, gradients(apart, step), strict=True):
            p.grad = g
        stacked.grad = torch.cat([p.grad for p in apart])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(stacked, torch.cat(list(apart)), atol=1e-12)


def test_a_tensor_of_three_dimensions_is_rows_and_the_rest() -> None:
    flat, cube = (trajectory(partial(SOAP, **VALUES), shapes=(shape,)) for shape in ((4, 6), (4, 2, 3)))
    (w,), (c,) = (parameters(shapes=(shape,)) for shape in ((4, 6), (4, 2, 3)))
    assert torch.equal(w.flatten(), c.flatten())  # the same numbers to begin with
    assert gap(flat, [[p.reshape(4, 6) for p in step] for step in cube]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 2, 10, 11])
def test_saved_and_loaded_it_goes_on_bit_by_bit(dtype: torch.dtype, at: int) -> None:
    def descend(optimizer: SOAP, params: list, steps: range) -> list:
        for step in steps:
            grads = gradients(params, step)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        return [p.detach().clone() for p in params]

    params = parameters(dtype, SHAPES)
    optimizer = SOAP(params, lr=0.03)
    others = [Parameter(w) for w in descend(optimizer, params, range(at))]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = SOAP(others, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    ends = descend(optimizer, params, range(at, 24)), descend(other, others, range(at, 24))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*ends, strict=True))


def test_it_keeps_no_gradient_and_waits_for_no_device() -> None:
    factory = partial(SOAP, **VALUES)
    assert gap(trajectory(factory, shapes=SHAPES), trajectory(factory, shapes=SHAPES, reuse=True)) == 0
    params = [Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = SOAP(params, precondition_frequency=1)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p)
        optimizer.step()


def test_gradients_of_zero_and_parameters_without_one() -> None:
    """A zero start gives much of a model none at first; a parameter that comes later has its own first step."""
    early, late = parameters(shapes=((8, 8), (8, 8)))
    before, optimizer = late.detach().clone(), SOAP([early, late], lr=0.03, precondition_frequency=2)
    for step in range(6):
        early.grad = torch.zeros_like(early) if step < 3 else gradients([early], step)[0]
        late.grad = gradients([late], step)[0] if step > 3 else None
        optimizer.step()
        assert torch.equal(late, before) == (step < 5) and early.isfinite().all()


@pytest.mark.parametrize("palm", [False, True])
def test_it_learns_from_a_zero_start(palm: bool) -> None:
    matrix = partial(SOAP, lr=3e-3, palm=palm)
    losses, largest = learn(
        tiny(optimizer=partial(Composite, matrix=matrix, other=partial(torch.optim.AdamW, lr=3e-3)))
    )
    assert losses[-1] < losses[0] - 1
    assert largest < 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"SOAP.lr: -1.0 \(expected 0 or more\)"),
        ({"betas": (0.9, 1.0)}, "SOAP.betas"),
        ({"shampoo_beta": 1.0}, "SOAP.shampoo_beta"),
        ({"shampoo_beta": 0.9, "palm": True}, "SOAP.shampoo_beta: 0.9 .expected null: with palm the second of betas"),
        ({"eps": -1.0}, "SOAP.eps"),
        ({"weight_decay": -0.1}, "SOAP.weight_decay"),
        ({"precondition_frequency": 0}, "SOAP.precondition_frequency: 0 .expected 1 or more"),
        ({"max_precond_dim": 1}, "SOAP.max_precond_dim: 1 .expected 2 or more"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SOAP(parameters(shapes=SQUARE), **values)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a tensor \(3,\)"):
        SOAP([Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"splits \(2, 2\) of a matrix of 5 rows"):
        SOAP([{"params": [Parameter(torch.zeros(5, 2))], "splits": [(2, 2)]}])
    with pytest.raises(ValueError, match="role embedding; fix: class_path: Composite with matrix: SOAP"):
        tiny(optimizer=SOAP).make_optimizer()
