"""DeMo as it is written down: one tile, one coefficient, one rank after the other."""

import math

import torch


def chunk(n, most=64):
    return max(size for size in range(1, most + 1) if n % size == 0)


def matrix(n):
    """The orthonormal DCT-II, entry by entry."""
    c = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n):
        for i in range(n):
            c[k, i] = math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n))
    return c


def tiles(x, most):
    """Views of the tiles; of a vector (1, n)."""
    a, b = chunk(x.shape[0], most) if x.shape[0] > 1 else 1, chunk(x.shape[1], most)
    return [x[i : i + a, j : j + b] for i in range(0, x.shape[0], a) for j in range(0, x.shape[1], b)]


def seen(x):
    """A vector as one row, more than two dimensions as two."""
    return x.reshape(1, -1) if x.ndim < 2 else x.reshape(x.shape[0], -1)


def demo_naive(weights, grads, deltas, lr, beta=0.999, topk=32, chunk=64, weight_decay=0.0, over_senders=True):
    """One step of all ranks.

    weights: those that all ranks have; grads, deltas: of each rank, a list. Weights and deltas change in place.
    """
    for rank_grads, rank_deltas in zip(grads, deltas, strict=True):
        for g, delta in zip(rank_grads, rank_deltas, strict=True):
            delta.copy_(beta * delta + lr * g)
    for at, w in enumerate(weights):
        update = torch.zeros_like(seen(w))
        of_ranks = [tiles(seen(rank_deltas[at]), chunk) for rank_deltas in deltas]
        for place, tile in enumerate(tiles(update, chunk)):
            a, b = matrix(tile.shape[0]), matrix(tile.shape[1])
            received: dict[tuple, list] = {}
            for own in of_ranks:
                coefficients = a @ own[place] @ b.T
                largest = sorted(
                    ((abs(float(c)), i, j) for i, row in enumerate(coefficients) for j, c in enumerate(row)),
                    reverse=True,
                )
                kept = torch.zeros_like(coefficients)
                for _, i, j in largest[:topk]:
                    kept[i, j] = coefficients[i, j]
                    received.setdefault((i, j), []).append(float(coefficients[i, j]))
                own[place].sub_(a.T @ kept @ b)
            mean = torch.zeros_like(tile)
            for (i, j), values in received.items():
                mean[i, j] = sum(values) / (len(values) if over_senders else len(deltas))
            tile.copy_((a.T @ mean @ b).sign())
        w.copy_(w - lr * weight_decay * w - lr * update.reshape(w.shape))
