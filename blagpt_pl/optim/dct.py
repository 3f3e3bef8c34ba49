"""The orthonormal cosine transform of a matrix, tile by tile.

Formula  C[k, n] = s_k cos(π (2 n + 1) k / (2 N)),  s_0 = sqrt(1 / N), s_k = sqrt(2 / N) otherwise;  X = C_a x C_b'
Cost     two products with a matrix of at most chunk columns for each number of the tile; the inverse costs the same
"""

from functools import cache
from math import pi, sqrt

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@cache
def dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(n, n): the orthonormal DCT-II, whose transpose is its inverse."""
    k, at = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = sqrt(2 / n) * torch.cos(pi * (2 * at + 1) * k / (2 * n))
    matrix[0] = sqrt(1 / n)
    return matrix.to(device, dtype)


def matrices(tiles: Tensor) -> list[Tensor]:
    """C_a and C_b for tiles (n, a, b), kept for the next ones; not those that belong to tensors without data."""
    make = dct_matrix.__wrapped__ if isinstance(tiles, FakeTensor) else dct_matrix
    return [make(size, tiles.dtype, tiles.device) for size in tiles.shape[1:]]


def chunk_of(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix: a vector is one row, dimensions past the second join the columns."""
    return (1, shape.numel()) if len(shape) < 2 else (shape[0], shape[1:].numel())


def to_tiles(x: Tensor, a: int, b: int) -> Tensor:
    """A tensor of any shape, seen as a matrix (r a, c b) -> (r c, a, b)."""
    rows, columns = as_matrix(x.shape)
    return x.reshape(rows // a, a, columns // b, b).transpose(1, 2).reshape(-1, a, b)


def from_tiles(tiles: Tensor, shape: torch.Size) -> Tensor:
    """(r c, a, b) -> the tensor of that shape whose tiles these are."""
    (rows, columns), (_, a, b) = as_matrix(shape), tiles.shape
    return tiles.reshape(rows // a, columns // b, a, b).transpose(1, 2).reshape(shape)


def dct(tiles: Tensor) -> Tensor:
    """(n, a, b) -> (n, a, b): the coefficients of each tile."""
    a, b = matrices(tiles)
    return a @ tiles @ b.mT


def inverse_dct(coefficients: Tensor) -> Tensor:
    """(n, a, b) -> (n, a, b): the tiles that have these coefficients."""
    a, b = matrices(coefficients)
    return a.mT @ coefficients @ b
