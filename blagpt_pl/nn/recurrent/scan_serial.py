"""The selective scan one position after the other: the form for a CPU, where a state of one position stays in the cache.

Formula  as in selective_scan.py
How      blocks of L positions. In each the decays are made at once, then the states one after the other, each in its place of one buffer,
         then the outputs at once; backward the same, from the last block to the first, with the states of a block made again
Cost     T steps of two operations on B I N numbers forward, four backward; one exponential a number and position forward, one backward.
         While it runs it holds a few buffers of L B I N numbers
"""

import torch
from torch import Tensor


def in_time(x: Tensor) -> Tensor:
    """(B, T, .) <-> (T, B, .)."""
    return x.transpose(0, 1).contiguous()


def states_of(first: Tensor, kept: Tensor, ux: Tensor, b: Tensor) -> Tensor:
    """The states of a block, the first one included: first (B, I, N), kept (L, B, I, N), ux (L, B, I), b (L, B, N) -> (L + 1, B, I, N)."""
    h = torch.cat((first[None], kept))
    for t in range(len(kept)):
        torch.mul(kept[t], h[t], out=h[t + 1])
        h[t + 1].addcmul_(ux[t, :, :, None], b[t, :, None])
    return h


def forwards(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, I), the last state (B, I, N), and the states before the blocks (B, T / L, I, N); arguments as for `selective_scan`."""
    x, dt, b, c = (in_time(t) for t in (x, dt, b, c))
    starts, y = [], []
    for xs, dts, bs, cs in zip(*(t.split(size) for t in (x, dt, b, c)), strict=True):
        starts.append(state)
        h = states_of(state, (dts[..., None] * a).exp_(), dts * xs, bs)
        y.append((h[1:] @ cs[..., None])[..., 0])  # (L, B, I)
        state = h[-1].clone()  # not the whole buffer
    return in_time(torch.cat(y)), state.clone(), torch.stack(starts, 1)


def backwards(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor, by_y: Tensor, by_state: Tensor, size: int
) -> list[Tensor]:
    """The gradients by x, dt, a, b, c and the state; those of y and of the last state are given."""
    x, dt, b, c, by_y = (in_time(t) for t in (x, dt, b, c, by_y))
    by_a, found = torch.zeros_like(a), []
    blocks = list(zip(*(t.split(size) for t in (x, dt, b, c, by_y)), first.unbind(1), strict=True))
    for xs, dts, bs, cs, by_ys, start in reversed(blocks):
        kept, ux = (dts[..., None] * a).exp_(), dts * xs
        h = states_of(start, kept, ux, bs)
        by_h, through = (
            torch.empty_like(kept),
            torch.empty_like(kept),
        )  # (L, B, I, N): by each state, by the one before it
        for t in reversed(range(len(kept))):
            torch.addcmul(by_state, by_ys[t, :, :, None], cs[t, :, None], out=by_h[t])
            by_state = torch.mul(kept[t], by_h[t], out=through[t])
        by_state = by_state.clone()
        taken = (by_h @ bs[..., None])[..., 0]  # (L, B, I): by dt x
        by_exponent = through.mul_(h[:-1])
        by_b, by_c = ((of[..., None, :] @ s)[..., 0, :] for of, s in ((ux, by_h), (by_ys, h[1:])))  # (L, B, N)
        found.append((dts * taken, xs * taken + (by_exponent * a).sum(-1), by_b, by_c))
        by_a += by_exponent.mul_(dts[..., None]).sum((0, 1))
    by_x, by_dt, by_b, by_c = (in_time(torch.cat(parts[::-1])) for parts in zip(*found, strict=True))
    return [by_x, by_dt, by_a, by_b, by_c, by_state.contiguous()]
