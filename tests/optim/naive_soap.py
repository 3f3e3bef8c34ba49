"""SOAP as it is written down: one matrix after the other, in the precision of its weights, one basis vector at a time."""

import torch


def soap_naive(
    w,
    g,
    state,
    t,
    lr,
    betas,
    shampoo_beta,
    eps=0.0,
    weight_decay=0.0,
    every=10,
    palm=False,
    permuted=True,
    longest=1 << 30,
):
    """The matrix after step t, counted from 1; `state` is a dictionary, first empty.

    `permuted` keeps the basis ordered by eigenvalue and moves the second moments along, as the authors' code does; `longest`
    is the length of a side above which it is left alone.
    """
    rows, columns = g.shape
    seen = {"left": g @ g.T if rows <= longest else None, "right": g.T @ g if columns <= longest else None}
    if t == 1:
        for side, gram in seen.items():
            if gram is not None:
                state[side] = (1 - shampoo_beta) * gram
                values, vectors = torch.linalg.eigh(state[side])
                state["Q" + side] = vectors[:, torch.argsort(values, descending=True)]
        state["m"], state["v"] = torch.zeros_like(g), torch.zeros_like(g)
        return w
    eye = {"left": torch.eye(rows, dtype=g.dtype), "right": torch.eye(columns, dtype=g.dtype)}
    left, right = (state.get("Q" + side, eye[side]) for side in seen)
    ahead = left.T @ g @ right
    k = t - 1
    beta1, beta2 = betas[0], 1 - t**-0.8 if palm else betas[1]
    if palm:  # no constant decay, so no closed form of the correction
        keep = 1 - (1 - beta2) / (1 - beta2**k)
        state["v"] = keep * state["v"] + (1 - keep) * ahead**2
        second = state["v"]
    else:
        state["v"] = beta2 * state["v"] + (1 - beta2) * ahead**2
        second = state["v"] / (1 - beta2**k)
    state["m"] = beta1 * state["m"] + (1 - beta1) * ahead
    update = left @ (state["m"] / (1 - beta1**k) / (second.sqrt() + eps)) @ right.T
    w = w - lr * weight_decay * w - lr * update
    mean = left @ state["m"] @ right.T
    for axis, (side, gram) in enumerate(seen.items()):
        if gram is None:
            continue
        state[side] = shampoo_beta * state[side] + (1 - shampoo_beta) * gram
        if k % every == 0:
            basis = state["Q" + side]
            sizes = torch.stack([q @ state[side] @ q for q in basis.T])
            order = torch.argsort(sizes, descending=True)
            new = torch.linalg.qr(state[side] @ basis[:, order])[0]
            if permuted:
                state["v"] = state["v"].index_select(axis, order)
                state["Q" + side] = new
            else:
                state["Q" + side] = torch.empty_like(new)
                state["Q" + side][:, order] = new
    left, right = (state.get("Q" + side, eye[side]) for side in seen)
    state["m"] = left.T @ mean @ right
    return w
