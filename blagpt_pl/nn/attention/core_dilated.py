"""Dilated attention: every query reads all of its near past and ever fewer positions of the farther one.

Source   Ding et al. 2023, "LongNet", arXiv:2307.02486, §2.2 and §2.3 (eqs. 4 to 10)
Formula  branch j cuts the sequence in segments of w_j tokens; head h keeps in them the positions p ≡ h (mod r_j), queries and
         keys alike, and reads causally among these. Branches are mixed in proportion to their softmax denominators, so that
         y_i = Σ_k c_ik e^(s_ik) v_k / Σ_k c_ik e^(s_ik),  s_ik = q_i · k_k / sqrt(K): one softmax, where c_ik counts the
         branches in which both i and k ≤ i are kept and share a segment
Differs  the mixing weights are differentiated, as the one softmax is (the authors' code detaches them); one branch at least
         keeps every position, so that no row of any head is left without an output; any length, also within a segment
Where    a core, not an attention of its own: it changes which pairs are read and nothing else of the pipeline, so edits,
         grouped heads and gates combine with it. It cannot be a mask of another core: c_ik weighs, and skipping is its point
Cost     2 K H T Σ_j w_j / r_j² multiply-adds a sequence (causal; each of T/r_j rows a head reads w_j/(2 r_j) keys); in memory
         scores H T Σ_j w_j / r_j², float32, and copies of q, k, v in proportion Σ_j 1/r_j: linear in T, no T × T matrix
"""

import math
from collections.abc import Callable, Iterable
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import Core, Heads, wide


def kept(x: Tensor, r: int, n: int) -> Tensor:
    """The rows that each of n heads keeps: (B, X, T, F) -> (B, n, T/r, F); head h reads head h // (n / X) of x.

    With r = 1 every row is kept, and x is returned as it is: heads that share its rows need no copies of them.
    """
    if r == 1:
        return x
    own = x.unbind(1)  # (B, T, F) each
    return torch.stack([own[h * len(own) // n][:, h % r :: r] for h in range(n)], dim=1)


def spread(x: Tensor, r: int, blank: float) -> Tensor:
    """Rows back at their positions, the other ones blank: (B, H, T/r, F) -> (B, H, T, F)."""
    if r == 1:
        return x
    offset = torch.arange(x.shape[1], device=x.device) % r  # (H,)
    own = torch.arange(r, device=x.device) == offset[:, None]  # (H, r)
    return torch.where(own[:, None, :, None], x.unsqueeze(3), blank).flatten(2, 3)


def everywhere(rows: Iterable[Tensor], rates: list[int], join: Callable, blank: float) -> Tensor:
    """What all branches have at each position, joined: for each rate r rows (B, H, T/r, F) -> (B, H, T, F)."""
    return reduce(join, [spread(x, r, blank) for x, r in zip(rows, rates, strict=True)])


def read(q: Tensor, k: Tensor, v: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention within segments of n rows, before its division: q (B, H, T, K), k (B, G, T, K), v (B, G, T, V).

    Returns:
        numerator (B, H, T, V) and denominator (B, H, T, 1), both divided by e^peak, and peak (B, H, T, 1), the largest score
        of the row: a constant to autograd, for it cancels.
    """
    heads, groups, length = q.shape[1], k.shape[1], q.shape[2]
    n = min(n, length)
    if length % n:  # later rows, which none of ours reads
        q, k, v = (F.pad(x, (0, 0, 0, -length % n)) for x in (q, k, v))
    share = heads // groups  # query heads that read the same keys: their rows are stacked, the keys are not repeated
    q = q.unflatten(1, (groups, share)).unflatten(3, (-1, n)).transpose(2, 3)  # (B, G, T/n, H/G, n, K)
    begin = q.shape[:3]
    q = q.flatten(3, 4).flatten(0, 2)  # (B G T/n, H/G n, K)
    k, v = (x.unflatten(2, (-1, n)).flatten(0, 2) for x in (k, v))  # (B G T/n, n, K or V)
    mask = torch.full((n, n), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(share, 1)
    scores = torch.baddbmm(mask, q, k.mT, alpha=q.shape[-1] ** -0.5)  # (B G T/n, H/G n, n)
    peak = scores.detach().amax(-1, keepdim=True)
    weight = (scores - peak).exp()

    def back(x: Tensor) -> Tensor:  # (B G T/n, H/G n, F) -> (B, H, T, F)
        x = x.unflatten(0, begin).unflatten(3, (share, n)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)[:, :, :length]

    return back(weight @ v), back(weight.sum(-1, keepdim=True)), back(peak)


class Dilated(Core):
    """Causal attention in segments, the longer the sparser.

    Args:
        heads: the attention's heads.
        segments: w_j, tokens of a segment, one for each branch.
        dilations: r_j, of which one token is kept in a segment; divides w_j, and is 1 in one branch at least.

    Raises:
        ValueError: the branches are none, malformed, leave positions out, or are not distinct within the context. (A branch
            written twice changes nothing when it is alone; beside others it would be a weight, at the price of a branch.)
    """

    sizes: ClassVar[dict[str, str]] = {"segments": "tokens", "dilations": "strides"}

    def __init__(self, heads: Heads, segments: list[int], dilations: list[int]) -> None:
        super().__init__()
        where = f"layer {heads.site.layer}: Dilated."
        if not segments or len(segments) != len(dilations):
            raise ValueError(
                f"{where}segments={segments}, dilations={dilations} (expected two lists of one length, 1 or more)"
            )
        branches = list(zip(segments, dilations, strict=True))
        for w, r in branches:
            if w < 1 or r < 1:
                raise ValueError(f"{where}segments={segments}, dilations={dilations} (expected numbers of 1 or more)")
            if w % r:
                fits = [d for d in range(1, w + 1) if w % d == 0]
                near = sorted(sorted(fits, key=lambda d: abs(d - r))[:4])
                raise ValueError(
                    f"{where}segments: {w} does not divide by its dilation {r}; nearby dilations that do: {near}"
                )
        if 1 not in dilations:
            raise ValueError(f"{where}dilations={dilations} leave out positions of every head (expected one to be 1)")
        reach = [(min(w, heads.site.context), r) for w, r in branches]
        for i, branch in enumerate(reach):
            if branch in reach[:i]:
                raise ValueError(
                    f"{where}segments={segments}, dilations={dilations}: branches {reach.index(branch)} and {i} are the "
                    f"same at a context of {heads.site.context} tokens (expected each once)"
                )
        self.heads = heads
        self.branches = branches
        self.rates = dilations
        self.period = math.lcm(*dilations)
        if max(segments) < heads.site.context:
            self.exempt = {"long memory": f"segments end every {max(segments)} tokens, and nothing crosses their edges"}

    def flops_per_token(self, context: int) -> int:
        pairs = 0
        for w, r in self.branches:
            for h in range(self.heads.n):
                full, rest = divmod((context - h % r + r - 1) // r, w // r)  # segments and rows that head h keeps
                pairs += full * (w // r) * (w // r + 1) // 2 + rest * (rest + 1) // 2
        return 2 * (self.heads.dim + self.heads.values) * pairs // context  # q·k and p·v, 2 each

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, length, dtype = self.heads.n, q.shape[2], v.dtype
        with without_autocast(q.device):  # it would round the scores
            q, k, v = wide(q), wide(k), wide(v)
            if length % self.period:
                q, k, v = (F.pad(x, (0, 0, 0, -length % self.period)) for x in (q, k, v))
            parts = [read(kept(q, r, heads), kept(k, r, heads), kept(v, r, heads), w // r) for w, r in self.branches]
            above, below, top = zip(*parts, strict=True)  # by branch: (B, H, T/r, V), (B, H, T/r, 1), (B, H, T/r, 1)
            peak = everywhere(top, self.rates, torch.maximum, -math.inf)  # (B, H, T, 1)
            scale = [(t - kept(peak, r, heads)).exp() for t, r in zip(top, self.rates, strict=True)]
            total = everywhere(map(torch.mul, below, scale), self.rates, torch.add, 0.0)
            share = [s / kept(total, r, heads) for s, r in zip(scale, self.rates, strict=True)]
            mixed = everywhere(map(torch.mul, above, share), self.rates, torch.add, 0.0)  # (B, H, T, V)
            return mixed[:, :, :length].to(dtype)
