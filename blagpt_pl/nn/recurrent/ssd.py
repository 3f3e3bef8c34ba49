"""SSD, Mamba-2's recurrence: a state that every head forgets at one rate a step, in chunks of matrix products.

Source   Dao & Gu 2024, "Transformers are SSMs", arXiv:2405.21060, §6
Formula  S_t = e^{a_t} S_{t-1} + x_t ⊗ b_t,  y_t = S_t c_t,  S (P, N); in a chunk of L steps, with s the running sum of a,
         y_i = Σ_{j ≤ i} (c_i · b_j) e^{s_i - s_j} x_j + e^{s_i} S c_i;  S ← e^{s_L} S + Σ_j e^{s_L - s_j} x_j ⊗ b_j
Differs  b and c are never copied for the heads of a group: where they meet the state, the heads of a group are rows of one
         product. Running sums and their differences are float64: behind a step that forgets all, those of float32 would be
         lost. What lies above the diagonal is -inf before the exp: masked after it, the gradients would be inf · 0
Cost     of a token and head 2 L P + 4 P N, of a token and group 2 L N multiplications and additions; linear in T
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import wide


def ssd(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """The recurrence over a piece of a sequence.

    Args:
        x: (B, T, H, P), what is written, times its step size.
        log_decay: (B, T, H), a, 0 or less.
        b: (B, T, G, N), where it is written; head h uses group h // (H / G).
        c: (B, T, G, N), where it is read.
        state: (B, H, P, N), S before the piece; zero if None.
        chunk: L, steps that are computed as one.

    Returns:
        y (B, T, H, P) and the state after the piece, in float32, or in float64 if x is.
    """
    with without_autocast(x.device):
        return _ssd(wide(x), wide(log_decay), wide(b), wide(c), None if state is None else wide(state), chunk)


def _ssd(x: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    size, length, heads, width = x.shape
    groups, n = b.shape[2:]
    chunk = min(chunk, length)
    pad = -length % chunk  # steps that write nothing and forget nothing
    x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (-1, chunk)) for t in (x, b, c))  # (B, M, L, ., .)
    b, c = b.transpose(2, 3), c.transpose(2, 3)  # (B, M, G, L, N)
    s = F.pad(a.double(), (0, 0, 0, pad)).unflatten(1, (-1, chunk)).cumsum(2).transpose(2, 3)  # (B, M, H, L)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (s[..., None] - s[..., None, :]).to(x.dtype).masked_fill(future, -torch.inf).exp()  # (B, M, H, L, L)
    scores = (c @ b.mT)[:, :, :, None] * decay.unflatten(2, (groups, -1))  # (B, M, G, H / G, L, L)
    within = scores.flatten(2, 3) @ x.transpose(2, 3)  # (B, M, H, L, P)
    left = (
        x * (s[..., -1:] - s).to(x.dtype).exp().transpose(2, 3)[..., None]
    )  # (B, M, L, H, P), as it is at the end of the chunk
    left = left.flatten(3).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, M, G, P H / G, L)
    written = (left @ b).flatten(2, 3)  # (B, M, H P, N)
    s = s.to(x.dtype)
    keep = s[..., -1].exp().repeat_interleave(width, 2)[..., None]  # (B, M, H P, 1)
    now = x.new_zeros(size, heads * width, n) if state is None else state.flatten(1, 2)
    before = []
    for kept, new in zip(keep.unbind(1), written.unbind(1), strict=True):
        before.append(now)
        now = torch.addcmul(new, kept, now)
    past = torch.stack(before, 1).unflatten(2, (groups, -1))  # (B, M, G, P H / G, N)
    across = (c @ past.mT).transpose(2, 3).reshape(x.shape)  # (B, M, L, H, P)
    y = within.transpose(2, 3) + across * s.exp().transpose(2, 3)[..., None]
    return y.flatten(1, 2)[:, :length], now.unflatten(1, (heads, width))
