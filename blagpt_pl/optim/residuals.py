"""State that differs from rank to rank, in a checkpoint that rank 0 writes: a row for each rank.

A piece at a time goes to rank 0 and from there to its host memory, so that no device needs room for the rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**22  # numbers of each rank that cross together


def place() -> tuple[int, int]:
    """This rank, and how many there are."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gathered(x: Tensor) -> Tensor:
    """A tensor of each rank -> (ranks, …) on rank 0, in host memory; on the others no row. All ranks must call it.

    One rank alone has a view (1, …) of its own.
    """
    rank, ranks = place()
    if ranks == 1:
        return x[None]
    flat = x.reshape(-1)
    rows = x.new_empty(ranks if rank == 0 else 0, *x.shape, device="cpu")
    start = 0
    for piece in flat.split(PIECE):
        pieces = [torch.empty_like(piece) for _ in range(ranks)] if rank == 0 else None
        dist.gather(piece.contiguous(), pieces, dst=0)
        for row, own in zip(rows, pieces or (), strict=True):
            row.view(-1)[start : start + len(own)].copy_(own)
        start += len(piece)
    return rows


def row_of(rows: Tensor | None) -> tuple[Tensor, bool]:
    """This rank's row of (ranks, …), or the mean of all where the number of ranks is another, and whether it is.

    Raises:
        ValueError: no rows are there.
    """
    rank, ranks = place()
    if rows is None or len(rows) == 0:
        raise ValueError("DeMo: the saved state has no row of `delta` for any rank (expected rank 0's state of DeMo)")
    return (rows[rank], False) if len(rows) == ranks else (rows.mean(0), True)
