"""Adam-mini as it is written down: one block after the other, each with a number of its own."""

import math


def adam_mini_naive(weights, grads, state, blocks, step, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    """One step on lists of tensors; weights and state change in place.

    `blocks` holds for each tensor a list of (first row, row after the last); `state` is an empty dictionary at first.
    """
    beta1, beta2 = betas
    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
        for first, end in blocks[i]:
            rows = slice(first, end) if w.ndim else ...
            m, v = state.get((i, first), (0, 0))
            m = beta1 * m + (1 - beta1) * g[rows]
            v = beta2 * v + (1 - beta2) * float((g[rows] ** 2).mean())
            state[i, first] = m, v
            w[rows] -= lr * weight_decay * w[rows]
            w[rows] -= lr * (m / (1 - beta1**step)) / (math.sqrt(v / (1 - beta2**step)) + eps)
