"""Newton-Schulz: the polynomial of the singular values that it is, the band they end in, batches."""

import pytest
import torch
from naive_muon import naive_newton_schulz, start

from blagpt_pl.optim.newton_schulz import BAND, LEAST, A, B, C, newton_schulz, working_dtype
from blagpt_pl.optim.orthogonal import by_shape, orthogonalise_


def lifted(s: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        s = A * s + B * s**3 + C * s**5
    return s


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 6), (5, 17)])
@pytest.mark.parametrize("steps", [1, 5])
def test_it_lifts_the_singular_values_and_turns_nothing(shape: tuple[int, int], steps: int) -> None:
    (x,) = start([shape])
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    expected = u @ torch.diag(lifted(s / (s.norm() + 1e-7), steps)) @ vh
    assert torch.allclose(newton_schulz(x[None], steps)[0], expected, atol=1e-10)


def test_singular_values_end_in_the_band() -> None:
    begun = torch.logspace(-5, 0, 200_001, dtype=torch.float64)
    ended = lifted(begun, 5)
    assert BAND[0] < ended[begun >= LEAST].min() and ended.max() < BAND[1]
    assert ended[begun < LEAST / 2].max() < BAND[0]  # the bound is no looser than it must be
    for seed in range(5):
        (x,) = start([(24, 40)], seed)
        ended = torch.linalg.svdvals(newton_schulz(x[None].float(), 5)[0])
        nearest = torch.linalg.svdvals(x).sign()  # with exact orthogonalisation, all are 1
        assert ((ended - nearest).abs() < 0.33).all()
        assert BAND[0] < ended.min() and ended.max() < BAND[1]


def test_a_batch_is_each_alone_and_a_stack_is_not_its_parts() -> None:
    matrices = start([(4, 9), (9, 4), (4, 9), (4, 4), (9, 4)])
    expected = [naive_newton_schulz(m) for m in matrices]
    both = naive_newton_schulz(torch.cat([matrices[0], matrices[2]]))
    assert [len(bundle) for bundle in by_shape(matrices)] == [4, 1]
    orthogonalise_(matrices, 5)
    for found, one in zip(matrices, expected, strict=True):
        assert torch.allclose(found, one, atol=1e-10)
    assert (both - torch.cat([expected[0], expected[2]])).abs().max() > 0.1


def test_zeros_stay_zeros_and_scale_does_not_matter() -> None:
    (x,) = start([(6, 8)])
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4), 5), torch.zeros(2, 3, 4))
    assert torch.allclose(newton_schulz(1e3 * x[None], 5), newton_schulz(x[None], 5), atol=1e-6)


def test_the_type_of_the_products() -> None:
    types = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: torch.float32}
    for given, used in types.items():
        assert (
            working_dtype(torch.zeros(1, dtype=given))
            == newton_schulz(torch.ones(1, 2, 3, dtype=given), 1).dtype
            == used
        )


@pytest.mark.gpu
def test_products_are_in_bfloat16_on_cuda() -> None:
    x = torch.randn(2, 64, 96, device="cuda")
    ended = newton_schulz(x, 5)
    assert ended.dtype == torch.bfloat16
    assert (ended.float() - newton_schulz(x.cpu(), 5).to(x.device)).abs().max() < 0.1
