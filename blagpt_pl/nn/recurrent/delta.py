"""The generalized delta rule: a memory that forgets by channel, and in which one direction is replaced at every step.

Source   Peng et al. 2025, "RWKV-7 Goose", arXiv:2503.14456, §4.1; by chunks: Yang et al. 2024, arXiv:2406.06484, §3, and Peng et
         al., appendix. With a = -κ, b = β κ, |κ| = 1 it is the delta rule: what κ read is taken away, a share β of it
Formula  S_t = diag(w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ;  y_t = S_tᵀ r_t, S (K, V), "diagonal plus low rank"
How      in a chunk of L steps with G the running sum of log w, Ĝ the same without the step's own, and u_t = S_{t-1}ᵀ a_t:
         A_xy = Σ_c x_ic y_jc e^{G_ic - G_jc}, for x = a with Ĝ_ic and j < i, for x = r with j ≤ i
         u = (1 - A_ab)⁻¹ (A_ak v + (a e^Ĝ) S);  y = (r e^G) S + A_rk v + A_rb u;  S ← e^{G_L} S + (k e^{G_L - G})ᵀ v + (b e^{G_L - G})ᵀ u
         All that does not hang on S is computed for all chunks at once: u, y and the next S are affine in S, and one product of
         (K, K) by (K, V) a chunk is left in the loop
Inverse  of a unit lower triangular matrix, by halves: [[P, 0], [C, Q]]⁻¹ = [[P⁻¹, 0], [-Q⁻¹ C P⁻¹, Q⁻¹]] from 1 × 1 up. As
         stable as substitution, and made of products. Squaring the nilpotent part is neither: keys that repeat make its powers
         grow as binomials, to 1e18 at L = 64 where the inverse has no number above 1
Numerics float32, whatever the inputs, or float64. e^{G_i - G_j} is e^{G_i - m} e^{m - G_j} with m half of the chunk's sum, so that
         Σ |log w| of a chunk may reach 170 before float32 overflows. RWKV-7's decay is at most e^-½ a step: 19 at L = 32
Cost     a head and token, forward: L (6 K + 4 V) + K (K + 3 V) + K² V / L + (L² - 4) / 3 multiply-adds, twice as many FLOPs
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import wide

CHUNK = 32  # the fastest of 16, 32 and 64 here, forward and backward


def inverse_of_unit(below: Tensor) -> Tensor:
    """(1 - A)⁻¹ of strictly lower triangular A (..., L, L), L a power of two; the same shape.

    What stands on and above the diagonal is not read.
    """
    inverse, size = below.new_ones(*below.shape[:-1], 1, 1), 1  # (..., L / size, size, size), blocks on the diagonal
    while size < below.shape[-1]:
        halves = below.unflatten(-2, (-1, 2, size)).unflatten(-1, (-1, 2, size))[..., 1, :, :, 0, :]
        corner = halves.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # of each pair of blocks, the one below
        upper, lower = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        corner = lower * corner * upper if size == 1 else lower @ corner @ upper
        inverse = torch.cat((F.pad(upper, (0, size)), torch.cat((corner, lower), -1)), -2)
        size *= 2
    return inverse.squeeze(-3)


def in_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, K) -> (B, H, n, L, K), zeros after the end: such a step forgets nothing and writes nothing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size))
    return x.unflatten(1, (-1, size)).movedim(3, 1)


def dplr(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over a sequence, or over a piece of one.

    Args:
        r: what is read, (B, T, H, K).
        log_w: logarithm of what is kept of each channel, 0 or below, (B, T, H, K).
        k: where is written, (B, T, H, K).
        v: what is written, (B, T, H, V).
        a: what is read to be replaced, (B, T, H, K).
        b: where that is written, (B, T, H, K).
        state: (B, H, K, V), the memory before; empty by default.
        chunk: L, a power of two; a matter of speed alone.

    Returns:
        y (B, T, H, V) in v's dtype, and the memory behind the last step, in float32 at least.
    """
    assert chunk & (chunk - 1) == 0, f"chunk {chunk} is no power of two"
    length, keys, values, dtype = v.shape[1], k.shape[-1], v.shape[-1], v.dtype
    size = min(chunk, 1 << (length - 1).bit_length())
    with without_autocast(v.device):
        r, log_w, k, v, a, b = (in_chunks(wide(x), size) for x in (r, log_w, k, v, a, b))  # (B, H, n, L, .)
        kept = log_w.cumsum(-2)  # G
        total = kept[..., -1:, :]  # G_L
        middle = total.detach() / 2  # it cancels
        reads = torch.cat((a * (kept - log_w - middle).exp(), r * (kept - middle).exp()), -2)  # (B, H, n, 2 L, K)
        writes = torch.cat((k, b), -2) * torch.cat((middle - kept, middle - kept), -2).exp()
        of_a, of_r = (reads @ writes.mT).split(size, -2)  # (B, H, n, L, 2 L): by k, by b
        a_by_k, a_by_b = (x.tril(-1) for x in of_a.split(size, -1))
        r_by_k, r_by_b = (x.tril() for x in of_r.split(size, -1))
        a_reads, r_reads = (reads * middle.exp()).split(size, -2)  # the memory before the chunk
        writes = writes * (total - middle).exp()  # into the memory behind it
        u, u_of_state = (inverse_of_unit(a_by_b) @ torch.cat((a_by_k @ v, a_reads), -1)).split([values, keys], -1)
        written = torch.cat((v, u), -2)  # (B, H, n, 2 L, V), were there no memory before
        y = torch.cat((r_by_k, r_by_b), -1) @ written
        y_of_state = r_reads + r_by_b @ u_of_state  # (B, H, n, L, K)
        gain = writes.mT @ written  # (B, H, n, K, V)
        kept_apart = torch.eye(keys, dtype=v.dtype, device=v.device) * total.exp()
        moved = kept_apart + writes[..., size:, :].mT @ u_of_state  # (B, H, n, K, K)
        state = v.new_zeros(*gain.shape[:2], keys, values) if state is None else state.to(v.dtype)
        shape, before, state = state.shape, [], state.flatten(0, 1)
        for move, add in zip(moved.flatten(0, 1).unbind(1), gain.flatten(0, 1).unbind(1), strict=True):
            before.append(state)
            state = torch.baddbmm(add, move, state)
        y = y + y_of_state @ torch.stack(before, 1).unflatten(0, shape[:2])
        state = state.view(shape)
    return y.movedim(1, 3).flatten(1, 2)[:, :length].to(dtype), state
