"""DeMo alone: equal to the loop over tiles and coefficients; what is sent leaves the residual; refusals; saved and loaded."""

import io
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from helpers import tiny
from naive_demo import demo_naive, matrix
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from blagpt_pl.errors import ConfigError
from blagpt_pl.optim import demo, residuals
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.dct import chunk_of, dct, dct_matrix, from_tiles, inverse_dct, to_tiles
from blagpt_pl.optim.demo import Bundle, DeMo, gather_all, index_type, mean_of
from blagpt_pl.optim.muon import Muon

SHAPES = ((12, 8), (8,), (6, 35), (5, 3, 4), (), (12, 8))
VALUES = {"lr": 0.03, "beta": 0.9, "topk": 3, "chunk": 4, "weight_decay": 0.1}


def naive(shapes: tuple = SHAPES, factor: Callable[[int], float] = lambda step: 1.0, **values: float) -> list[list]:
    """The trajectory of the naive twin, alone in the world."""
    weights = [p.detach().clone() for p in parameters(shapes=shapes)]
    deltas, seen = [torch.zeros_like(w) for w in weights], []
    for step in range(STEPS):
        grads = gradients([Parameter(w) for w in weights], step)
        demo_naive(weights, [grads], [deltas], **{**values, "lr": values["lr"] * factor(step)})
        seen.append([w.clone() for w in weights])
    return seen


@pytest.mark.parametrize(
    "changes", [{}, {"topk": 16}, {"chunk": 64, "topk": 32, "beta": 0.999}, {"chunk": 1, "topk": 1}]
)
def test_it_is_the_loop_over_tiles(changes: dict) -> None:
    values, factor = {**VALUES, **changes}, (lambda step: 1 - step / 30)
    found = trajectory(partial(DeMo, **values), shapes=SHAPES, factor=factor)
    assert gap(found, naive(factor=factor, **values)) < 1e-10
    assert gap(found, trajectory(partial(DeMo, **values), shapes=SHAPES, factor=factor, reuse=True)) == 0


@pytest.mark.parametrize("changes", [{"topk": 4}, {"chunk": 2}, {"beta": 0.8}, {"weight_decay": 0.0}])
def test_every_value_of_it_is_seen(changes: dict) -> None:
    assert gap(trajectory(partial(DeMo, **VALUES), shapes=SHAPES), naive(**{**VALUES, **changes})) > 1e-3


def test_a_constant_factor_of_the_gradient_changes_nothing_but_the_schedule_does() -> None:
    """The update is a sign: of the learning rate in the momentum only the course over steps matters."""

    def moved(scale: float, factor: Callable[[int], float]) -> list[Tensor]:
        params = parameters(shapes=SHAPES[:1])
        optimizer = DeMo(params, lr=1.0, beta=0.9, topk=2, chunk=4)
        signs = []
        for step in range(STEPS):
            before = params[0].detach().clone()
            params[0].grad = scale * torch.randn(
                12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
            )
            optimizer.param_groups[0]["lr"] = factor(step)
            optimizer.step()
            signs.append((params[0].detach() - before).sign())
        return signs

    flat, scaled = moved(1, lambda step: 1.0), moved(1000, lambda step: 1.0)
    assert all(torch.equal(a, b) for a, b in zip(flat, scaled, strict=True))
    falling = moved(1, lambda step: 0.5**step)
    assert not all(torch.equal(a, b) for a, b in zip(flat, falling, strict=True))


def test_the_transform_is_orthonormal_and_lossless() -> None:
    x = torch.randn(12, 35, dtype=torch.float64)
    tiles = to_tiles(x, 6, 7)
    assert tiles.shape == (10, 6, 7) and torch.equal(tiles[1], x[:6, 7:14])
    coefficients = dct(tiles)
    assert (coefficients[3] - matrix(6) @ tiles[3] @ matrix(7).T).abs().max() < 1e-14
    assert coefficients.square().sum() == pytest.approx(float(x.square().sum()), rel=1e-12)
    assert (from_tiles(inverse_dct(coefficients), x.shape) - x).abs().max() < 1e-13
    assert [chunk_of(n, 64) for n in (1, 61, 67, 96, 768, 50304)] == [1, 61, 1, 48, 64, 64]


def test_all_coefficients_sent_leave_nothing_and_few_leave_the_rest() -> None:
    p = Parameter(torch.zeros(8, 8, dtype=torch.float64))
    p.grad = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for topk, left in ((64, 0), (10, 54)):
        optimizer = DeMo([p], chunk=8, topk=topk, lr=1.0)
        optimizer.step()
        assert (dct(optimizer.state[p]["delta"][None]).abs() > 1e-12).sum() == left


def test_a_coefficient_is_the_mean_over_those_that_sent_it() -> None:
    values = torch.tensor([[[4.0, 2.0]], [[6.0, 8.0]]])
    indices = torch.tensor([[[0, 3]], [[3, 1]]], dtype=torch.int16)
    found = mean_of(Bundle([], {}, (2, 2), values[0], indices[0]), values, indices)
    assert found.tolist() == [[[4.0, 8.0], [0.0, 4.0]]]


def test_pieces_of_any_dtype_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        size = staticmethod(lambda: 2)

    def twice(out: Tensor, message: Tensor, group: object) -> None:
        out.copy_(torch.cat([message, message]))

    monkeypatch.setattr(demo, "all_gather", twice)
    parts = [
        torch.arange(3, dtype=torch.int16),
        torch.randn(5),
        torch.randn(3, 1, dtype=torch.float64),
        torch.arange(7),
    ]
    found, size = gather_all(parts, Two())
    assert size == 3 * 2 + 5 * 4 + 3 * 8 + 7 * 8
    for part, both in zip(parts, found, strict=True):
        assert torch.equal(both, torch.stack([part, part]))


def test_parameters_are_transformed_in_bundles_of_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trajectory(partial(DeMo, **VALUES), shapes=SHAPES)
    monkeypatch.setattr(demo, "AT_ONCE", 100)
    assert [places for _, places in demo.batches(parameters(shapes=SHAPES), 4)] == [[0], [5], [1, 3], [2], [4]]
    assert gap(trajectory(partial(DeMo, **VALUES), shapes=SHAPES), expected) == 0


def test_a_residual_of_bfloat16_weights_is_float32_also_after_loading() -> None:
    """In bfloat16 a factor of 0.999 is a factor of one."""
    params = parameters(torch.bfloat16)
    optimizer = DeMo(params, lr=0.01)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    optimizer.step()
    other = DeMo(params)
    other.load_state_dict(optimizer.state_dict())
    for p in params:
        assert optimizer.state[p]["delta"].dtype == torch.float32 == other.state[p]["delta"].dtype
        assert torch.equal(optimizer.state[p]["delta"], other.state[p]["delta"])
    before = other.state[params[0]]["delta"].clone()
    other.step()
    assert torch.equal(optimizer.state[params[0]]["delta"], before)  # two optimizers, two memories


def test_parameters_without_a_gradient_stay() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = DeMo(params, weight_decay=0.1)
    optimizer.step()
    params[1].grad = before[1].clone()
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False]
    assert list(optimizer.state) == [params[1]] and optimizer.bytes_sent == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_by_bit(dtype: torch.dtype) -> None:
    class Renewed(DeMo):
        """Replaces its state by what a file of it holds, before each step."""

        def step(self, closure: Callable | None = None) -> object:
            file = io.BytesIO()
            torch.save(self.state_dict(), file)
            file.seek(0)
            self.state.clear()
            self.load_state_dict(torch.load(file, weights_only=True))
            return super().step(closure)

    plain, renewed = (trajectory(partial(kind, **VALUES), dtype=dtype, shapes=SHAPES) for kind in (DeMo, Renewed))
    assert gap(plain, renewed) == 0


def test_the_state_of_more_ranks_is_averaged_and_the_state_of_none_refused() -> None:
    params = parameters()
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = DeMo(params)
    optimizer.step()
    saved = optimizer.state_dict()
    state = {key: {"delta": torch.cat([s["delta"], 3 * s["delta"]])} for key, s in saved["state"].items()}
    with pytest.warns(UserWarning, match="another number of ranks"):
        optimizer.load_state_dict({**saved, "state": state})
    assert torch.equal(optimizer.state[params[0]]["delta"], 2 * saved["state"][0]["delta"][0])
    for lost in ({"delta": saved["state"][0]["delta"][:0]}, {"exp_avg": torch.zeros(12, 8)}):
        with pytest.raises(ValueError, match="no row of `delta`"):
            optimizer.load_state_dict({**saved, "state": {0: lost}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, r"DeMo.lr: -1.0 \(expected 0 or more\)"),
        ({"beta": 1.0}, r"DeMo.beta: 1.0 \(expected a number in \[0, 1\)\)"),
        ({"chunk": 0}, "DeMo.chunk: 0"),
        ({"topk": 0}, "DeMo.topk: 0"),
        ({"topk": 17, "chunk": 4}, r"DeMo.topk: 17 \(expected 1 to 16, the numbers of a tile\)"),
        ({"weight_decay": -0.1}, "DeMo.weight_decay"),
    ],
)
def test_values_out_of_range(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeMo(parameters(), **values)


def test_beside_an_optimizer_of_equal_gradients_it_is_refused() -> None:
    def both(groups: Iterable) -> Composite:
        return Composite(groups, matrix=Muon, other=DeMo)

    with pytest.raises(
        ConfigError, match=r"Composite.other: DeMo wants each rank's own gradients.*fix: class_path: DeMo"
    ):
        tiny(optimizer=both).make_optimizer()


def test_every_place_of_a_tile_has_an_index() -> None:
    for tile in ((64, 64), (128, 256), (1, 2**15), (256, 256), (1, 2**15 + 1)):
        last = torch.tensor(tile[0] * tile[1] - 1)
        assert last.to(index_type(tile)) == last
    assert (index_type((128, 256)), index_type((256, 256))) == (torch.int16, torch.int32)


def test_a_tensor_larger_than_a_piece_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(piece: Tensor, pieces: list[Tensor], dst: int) -> None:
        for rank, received in enumerate(pieces):
            received.copy_(piece + 100 * rank)

    monkeypatch.setattr(residuals, "place", lambda: (0, 3))
    monkeypatch.setattr(residuals, "PIECE", 5)
    monkeypatch.setattr(residuals.dist, "gather", gather)
    x = torch.randn(4, 3)
    assert torch.equal(residuals.gathered(x), torch.stack([x, x + 100, x + 200]))


def test_tensors_without_data_leave_nothing_behind() -> None:
    """As `blagpt describe` follows them, before a training in the same process."""
    dct_matrix.cache_clear()
    with FakeTensorMode():
        params = [Parameter(torch.randn(8, 6))]
        params[0].grad = torch.randn(8, 6)
        DeMo(params).step()
    x = torch.randn(3, 4, 5)
    assert torch.allclose(inverse_dct(dct(x)), x, atol=1e-5)
