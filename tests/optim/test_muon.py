"""Muon: equal to the loop over matrices, to torch's own; map by map; refusals; compiled once."""

import copy
import io
from functools import partial

import pytest
import torch
from helpers import VARIANTS, batch, tiny
from naive_muon import muon_naive, start
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.nn.base import StackedLinear
from blagpt_pl.nn.roles import splits_of
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.muon import Muon
from blagpt_pl.optim.roles import groups_by_role

SHAPES = [(4, 9), (9, 4), (4, 9), (5, 5), (12, 4), (1, 6)]
STEPS = 4


def trained(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = STEPS, seed: int = 1) -> list:
    """The parameters after steps along random gradients."""
    for step in range(steps):
        for p, g in zip(params, start([p.shape for p in params], seed + step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["shape", "rms"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_is_the_loop_over_matrices(nesterov: bool, scale: str, weight_decay: float) -> None:
    values = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay, "scale": scale}
    params = [Parameter(w) for w in start(SHAPES)]
    found = trained(Muon(params, **values), params)
    weights, momenta = start(SHAPES), [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(STEPS):
        muon_naive(weights, start(SHAPES, 1 + step), momenta, **values)
    assert max((a - b).abs().max() for a, b in zip(found, weights, strict=True)) < 1e-10
    weights[0].add_(1e-8)
    assert (found[0] - weights[0]).abs().max() > 1e-10


@pytest.mark.parametrize(("scale", "theirs"), [("shape", "original"), ("rms", "match_rms_adamw")])
def test_muon_is_torchs_own_but_for_bfloat16(scale: str, theirs: str) -> None:
    lr = 0.02
    ours, torchs = ([Parameter(w.float()) for w in start(SHAPES)] for _ in range(2))
    found = trained(Muon(ours, lr=lr, weight_decay=0.1, scale=scale), ours)
    expected = trained(torch.optim.Muon(torchs, lr=lr, weight_decay=0.1, adjust_lr_fn=theirs), torchs)
    moved = max((a - w).abs().max() for a, w in zip(expected, start(SHAPES), strict=True))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 2e-2 * lr * STEPS < moved / 4


def test_a_stacked_matrix_is_taken_map_by_map() -> None:
    apart = [Parameter(w) for w in start([(4, 6), (2, 6), (2, 6)])]
    stacked = Parameter(torch.cat(start([(4, 6), (2, 6), (2, 6)])))
    group = {"params": [stacked], "role": "matrix", "splits": [(4, 2, 2)]}
    optimizers = Muon(apart, lr=0.1), Muon([group], lr=0.1)
    for step in range(STEPS):
        gradients = start([(4, 6), (2, 6), (2, 6)], 1 + step)
        for p, g in zip(apart, gradients, strict=True):
            p.grad = g
        stacked.grad = torch.cat(gradients)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(stacked, torch.cat(list(apart)), atol=1e-12)


@pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)
def test_the_maps_of_a_model(build: partial) -> None:
    model = build()
    groups = {g["role"]: g for g in groups_by_role(model.named_parameters(), model.parameter_roles(), splits_of(model))}
    matrices, splits = groups["matrix"]["params"], groups["matrix"]["splits"]
    assert [sum(rows) for rows in splits] == [len(p) for p in matrices]
    stacks = [m for m in model.modules() if isinstance(m, StackedLinear)]
    assert {id(m.weight) for m in stacks} == {id(p) for p, rows in zip(matrices, splits, strict=True) if len(rows) > 1}
    heads = model.blocks[0].attention.part.heads
    assert splits[0] == (heads.n * heads.dim, heads.n_kv * heads.dim, heads.n_kv * heads.dim)
    assert "splits" not in groups["embedding"] and "splits" not in groups["vector"]


@pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)
def test_embeddings_and_heads_never_go_to_muon(build: partial) -> None:
    model = build(optimizer=partial(Composite, matrix=Muon, other=partial(torch.optim.SGD, lr=0.0)))
    optimizer = model.make_optimizer()
    ours = {id(p) for group in optimizer.members["matrix"].param_groups for p in group["params"]}
    roles = model.parameter_roles()
    assert ours == {id(p) for name, p in model.named_parameters() if roles[name] == "matrix"}
    assert not ours & {id(p) for p in (*model.embedding.parameters(), *model.head.parameters())}
    model.optimizer_factory = Muon
    with pytest.raises(ValueError, match=r"role embedding; fix: class_path: Composite with matrix: Muon"):
        model.make_optimizer()


def test_parameters_without_a_gradient_stay() -> None:
    params = [Parameter(w) for w in start(SHAPES[:3])]
    before = [p.detach().clone() for p in params]
    optimizer = Muon(params, weight_decay=0.1)
    optimizer.step()
    params[1].grad = before[1].clone()
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, True]
    assert list(optimizer.state) == [params[1]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"Muon.lr: -1.0 \(expected 0 or more\)"),
        ({"momentum": 1.0}, "Muon.momentum"),
        ({"momentum": 0.0}, "Muon.nesterov: has no effect without momentum"),
        ({"weight_decay": -0.1}, "Muon.weight_decay"),
        ({"scale": "none"}, "Muon.scale: none .expected shape or rms"),
        ({"steps": 0}, "Muon.steps"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([Parameter(torch.zeros(2, 2))], **values)


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"found a tensor \(3,\)"):
        Muon([Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"splits \(2, 2\) of a matrix of 5 rows"):
        Muon([{"params": [Parameter(torch.zeros(5, 2))], "splits": [(2, 2)]}])


def test_saved_and_loaded_it_goes_on_bit_by_bit() -> None:
    params = [Parameter(w.float()) for w in start(SHAPES)]
    optimizer = Muon(params, lr=0.1)
    trained(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [Parameter(p.detach().clone()) for p in params]
    other = Muon(others, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lr"] == 0.1
    for a, b in zip(trained(optimizer, params, seed=9), trained(other, others, seed=9), strict=True):
        assert torch.equal(a, b)


def test_compiled_it_is_the_same_and_no_learning_rate_compiles_it_anew() -> None:
    shapes = [(n, 2 * n) for n in range(2, 14)]  # more shapes than a graph may have variants
    optimizers = []
    for backend in ("aot_eager", None):
        params = [Parameter(w.float()) for w in start(shapes)]
        optimizers.append((Muon(params, weight_decay=0.1, compile=backend), params))
    torch._dynamo.utils.counters.clear()
    for step in range(6):
        results = []
        for optimizer, params in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            results.append(trained(optimizer, params, 1, seed=step))
        assert max((a - b).abs().max() for a, b in zip(*results, strict=True)) < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # momenta, iterations, weights


class Ops(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


def test_products_are_made_once_for_a_shape_not_for_a_matrix() -> None:
    def products(layers: int) -> int:
        params = [Parameter(torch.randn(s)) for s in [(8, 8), (8, 24), (24, 8)] * layers]
        optimizer = Muon(params)
        for p in params:
            p.grad = torch.randn_like(p)
        with Ops() as ops:
            optimizer.step()
        return sum("bmm" in name or "mm." in name for name in ops.names)

    assert products(1) == products(6) == 2 * 5 * 3  # two shapes, three products in each of five iterations


def test_it_learns_and_a_copy_of_it_goes_on_alike() -> None:
    model = tiny(optimizer=partial(Composite, matrix=Muon, other=partial(torch.optim.AdamW, lr=3e-3)))
    optimizer = model.make_optimizer()
    inputs, targets = batch(model, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.objective(inputs, targets)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5
    twin_model, twin = copy.deepcopy((model, optimizer))
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        b.grad = a.grad.clone()  # a copy of a parameter has none
    for one in (optimizer, twin):
        one.step()
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)
