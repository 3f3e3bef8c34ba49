"""The generalized delta rule as it is defined: one step after the other, in float64."""

import torch
from torch import Tensor


def naive_dplr(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ, y_t = S_tᵀ r_t; shapes as `blagpt_pl.nn.recurrent.delta.dplr`."""
    r, log_w, k, v, a, b = (x.double() for x in (r, log_w, k, v, a, b))
    batch, _, heads, keys = k.shape
    memory = k.new_zeros(batch, heads, keys, v.shape[-1]) if state is None else state.double()
    out = []
    for t in range(k.shape[1]):
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], memory)
        memory = (
            log_w[:, t].exp()[..., None] * memory
            + torch.einsum("bhk,bhv->bhkv", b[:, t], read)
            + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        )
        out.append(torch.einsum("bhk,bhkv->bhv", r[:, t], memory))
    return torch.stack(out, 1), memory
