"""The elementwise half of the next-token loss: from the scores of one chunk of tokens to its sums and their gradients.

Formula  z = cap(s);  log Z = logsumexp(z);  loss_k = log Z - z[y_k];  p = exp(z - log Z)
         ∂/∂z = p · (Σ_k c_k + Σ ∂term/∂log Z) - Σ_k c_k · onehot(y_k) + Σ ∂term/∂z,  c_k a target's share or 0
         ∂/∂s = ∂/∂z · (1 - (z / c)²) where soft-capped;  all in float32 (float64 for float64)
Note     one graph without a break: compiled, it reads the scores twice and writes their gradients once
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.term import LogitTerm, NormaliserTerm
from blagpt_pl.nn.base import wide
from blagpt_pl.nn.softcap import soft_cap


def slopes(
    scores: Tensor, targets: Tensor, shares: Tensor, cap: float | None, terms: Sequence[LogitTerm] = ()
) -> tuple[Tensor, Tensor]:
    """Sums over the rows of a chunk, and their gradient.

    Args:
        scores: (n, V), what the head's linear map gives.
        targets: (n, K).
        shares: (K,), what a target that counts is multiplied by.
        cap: c of the head's soft cap.
        terms: of the logits.

    Returns:
        (K + terms,) as `next_token.summed` has them; and the gradient of their sum by the scores, (n, V), their dtype.
    """
    z = wide(scores)
    if cap is not None:
        z = soft_cap(z, cap)
    counts = targets != IGNORE  # (n, K)
    at = torch.where(counts, targets, 0)
    share = torch.where(counts, shares.to(z.dtype), 0.0)  # (n, K)
    log_p = z.log_softmax(-1)
    losses = -log_p.gather(1, at)  # (n, K)
    log_z = losses[:, 0] + z.gather(1, at[:, :1])[:, 0]  # (n,)
    sums, by_log_z, by_z = [*(share * losses).sum(0)], share.sum(1), None
    for term in terms:
        of, x = (term.of, log_z) if isinstance(term, NormaliserTerm) else (term, z)
        value, pull = torch.func.vjp(lambda x, of=of: of(x, targets[:, 0]), x)
        (slope,) = pull(torch.ones_like(value))
        sums.append(value.sum())
        if isinstance(term, NormaliserTerm):
            by_log_z = by_log_z + slope
        else:
            by_z = slope if by_z is None else by_z + slope
    gradient = less_at(log_p.exp_().mul_(by_log_z[:, None]), at, share)  # in place: nobody differentiates this
    if by_z is not None:
        gradient = gradient.add_(by_z)
    if cap is not None:
        gradient = gradient.mul_(z.div_(cap).square_().neg_().add_(1))
    return torch.stack(sums), gradient.to(scores.dtype)


def less_at(x: Tensor, at: Tensor, amount: Tensor) -> Tensor:
    """x (n, V), less `amount` (n, K) in the columns `at` (n, K); x itself is used up.

    A scatter is a kernel of its own; a comparison is fused with what is around it, but takes a mask of (n, V) if it is not.
    """
    if not torch.compiler.is_compiling():
        return x.scatter_add_(1, at, -amount)
    columns = torch.arange(x.shape[1], device=x.device)
    for k in range(at.shape[1]):
        x = torch.where(columns == at[:, k : k + 1], x - amount[:, k : k + 1], x)
    return x


def nats(scores: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    """Sum of the losses of a chunk in float64: scores (n, V), targets (n,)."""
    z = wide(scores)
    if cap is not None:
        z = soft_cap(z, cap)
    counts = targets != IGNORE
    losses = -z.log_softmax(-1).gather(1, torch.where(counts, targets, 0)[:, None])[:, 0]
    return torch.where(counts, losses, 0.0).sum(dtype=torch.float64)
