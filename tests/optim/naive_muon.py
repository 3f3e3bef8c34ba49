"""Muon as it is written down: one matrix after the other, nothing shared, nothing batched."""

import math

import torch


def naive_newton_schulz(x, steps=5):
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def muon_naive(weights, grads, momenta, lr, momentum=0.95, nesterov=True, weight_decay=0.0, scale="shape"):
    """One step on lists of matrices, each one map; weights and momenta change in place."""
    for w, g, m in zip(weights, grads, momenta, strict=True):
        m.copy_(momentum * m + (1 - momentum) * g)
        update = naive_newton_schulz((1 - momentum) * g + momentum * m if nesterov else m)
        rows, columns = w.shape
        size = math.sqrt(max(1, rows / columns)) if scale == "shape" else 0.2 * math.sqrt(max(rows, columns))
        w.copy_(w - lr * weight_decay * w - lr * size * update)


def start(shapes, seed=0):
    """Matrices of these shapes, float64."""
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=dice, dtype=torch.float64) for shape in shapes]
