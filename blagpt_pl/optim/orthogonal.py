"""Orthogonalises many matrices, each once in the world: equal shapes together, and every rank its share of them.

A matrix that is taller than wide is transposed first, so that (F, D) and (D, F) are one shape. The matrices of a shape are cut
into as many equal runs as there are ranks, the last one filled up with zeros; each rank iterates its run as one batch, and an
all-gather hands all results to all. So the same bits reach every rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from blagpt_pl.optim.newton_schulz import newton_schulz

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name until torch 2.13


def orthogonal(batches: list[list[Tensor]], steps: int) -> list[Tensor]:
    """Of each list of n matrices (r, c), r <= c: their orthogonalisations (n, r, c)."""
    return [newton_schulz(torch.stack(batch), steps) for batch in batches]


def by_shape(matrices: Sequence[Tensor]) -> list[list[Tensor]]:
    """The matrices of each shape, lying: views (r, c) with r <= c."""
    found: dict[tuple, list[Tensor]] = {}
    for matrix in matrices:
        lying = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
        found.setdefault((lying.shape, lying.dtype, lying.device), []).append(lying)
    return list(found.values())


def orthogonalise_(
    matrices: Sequence[Tensor],
    steps: int,
    ranks: ProcessGroup | None = None,
    body: Callable[[list[list[Tensor]], int], list[Tensor]] = orthogonal,
) -> None:
    """Replace every matrix, in place, by its orthogonalisation.

    Args:
        matrices: (rows, columns) each; the same ones, in the same order, on all ranks.
        steps: iterations of `newton_schulz`.
        ranks: those who share the work; None where each does all of it.
        body: `orthogonal`, or its compiled form.
    """
    bundles = by_shape(matrices)
    results = body(bundles, steps) if ranks is None else shared(bundles, steps, ranks, body)
    for bundle, result in zip(bundles, results, strict=True):
        torch._foreach_copy_(bundle, list(result.unbind())[: len(bundle)])


def shared(bundles: list[list[Tensor]], steps: int, ranks: ProcessGroup, body: Callable) -> list[Tensor]:
    """Of each n matrices (r, c): n or a few more (·, r, c), of which each rank has made one run."""
    world, rank = ranks.size(), ranks.rank()
    lengths = [-(-len(bundle) // world) for bundle in bundles]
    runs = []
    for bundle, n in zip(bundles, lengths, strict=True):
        whole = bundle + [torch.zeros_like(bundle[0])] * (world * n - len(bundle))
        runs.append(whole[rank * n : (rank + 1) * n])
    mine = body(runs, steps)
    results = [run.new_empty(world * len(run), *run.shape[1:]) for run in mine]
    under_way = [
        all_gather(result, run.contiguous(), group=ranks, async_op=True)
        for result, run in zip(results, mine, strict=True)
    ]
    for work in under_way:
        work.wait()
    return results
