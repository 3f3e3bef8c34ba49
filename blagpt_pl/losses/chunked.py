"""Next-token cross-entropy that never holds the logits of more than one chunk of tokens.

How      the tokens are cut into chunks; each chunk's logits, loss and gradients (with respect to its features and to the
         head's parameters) are made together in the forward pass and the logits let go. Backward only scales the stored
         gradients, so no matrix product is done twice, and each parameter's gradient arrives once. The head's gradients
         add up in float32
Heads    one that is a linear map (`nn.base.Head.as_linear`): the gradients are written out here (`losses.slopes`). Any other
         head, one with hooks, and one beside terms that learn something, is differentiated by autograd, chunk by chunk
Twin     `next_token.Full`; the same value and gradients
Source   the idea: Wijmans et al. 2024 (Cut Cross-Entropy), arXiv:2411.09009; Hsu et al. 2024 (Liger), arXiv:2410.10989
Cost     scores of one chunk and their gradient, 2 · chunk · V, instead of (B T) · V; one float32 gradient of the head. Each
         chunk reads and writes that gradient once more, so chunks are an eighth of the tokens, and 8192 of them at most
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses import slopes
from blagpt_pl.losses.next_token import NextToken, flat, summed, token_losses
from blagpt_pl.losses.stored import given_back, gradients, stored, unkept
from blagpt_pl.losses.term import LogitTerm
from blagpt_pl.nn.autocast import autocast_dtype, without_autocast
from blagpt_pl.nn.base import LinearMap, wide
from blagpt_pl.nn.compiled import compiled

FEWEST, LARGEST, SMALLEST = 8, 8192, 256  # chunks; tokens of a chunk


def chunk_of(n: int) -> int:
    """Tokens of a chunk, for n tokens: an eighth within bounds, and all chunks alike where a near number of them allows it."""
    least = -(-n // max(SMALLEST, min(LARGEST, -(-n // FEWEST))))
    even = next((pieces for pieces in range(least, 2 * least + 1) if n % pieces == 0), least)
    return max(1, -(-n // even))


def linear_of(head: nn.Module) -> LinearMap | None:
    """The head as a linear map, if it is one and nobody listens to its calls (hooks, a `forward` put on an instance)."""
    if not hasattr(head, "as_linear") or any(listened_to(module) for module in head.modules()):
        return None
    return head.as_linear()


def listened_to(module: nn.Module) -> bool:
    """Whether to call a module is more than its class says."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return "forward" in vars(module) or any(getattr(module, f"_{kind}_hooks") for kind in kinds)


def learned(modules: Iterable[nn.Module]) -> list[Tensor]:
    """What the modules learn, each tensor once."""
    return list({id(p): p for module in modules for p in module.parameters() if p.requires_grad}.values())


class Chunked(NextToken):
    """Chunk by chunk.

    Args:
        chunk: tokens of a chunk; `chunk_of` says how many by default.
        rows, nats_of: `slopes.slopes` and `slopes.nats`, or their compiled forms.
        any_rows: `next_token.summed` or its compiled form, for heads that are no linear map.
    """

    def __init__(
        self,
        chunk: int | None = None,
        rows: Callable = slopes.slopes,
        nats_of: Callable = slopes.nats,
        any_rows: Callable = summed,
    ) -> None:
        self.chunk, self.rows, self.nats_of, self.any_rows = chunk, rows, nats_of, any_rows

    def compiled(self, backend: str | Callable) -> "Chunked":
        return Chunked(self.chunk, *(compiled(f, backend) for f in (self.rows, self.nats_of, self.any_rows)))

    def parts(
        self,
        head: nn.Module,
        features: Tensor,
        targets: Tensor,
        terms: Sequence[LogitTerm] = (),
        weights: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        features, targets, n, shares = flat(features, targets, weights)
        chunk = self.chunk or chunk_of(len(features))
        linear = None if learned(terms) else linear_of(head)
        if linear is None:
            parameters = learned([head, *terms])
            make = partial(self._by_autograd, head, features, targets, shares, terms, n, chunk, parameters)
            return stored(make, [features, *parameters])
        rows = partial(self.rows, cap=linear.cap, terms=tuple(terms))
        return _Stored.apply(features, linear.weight, linear.bias, targets, shares, n, rows, chunk)

    def _by_autograd(
        self,
        head: nn.Module,
        x: Tensor,
        targets: Tensor,
        shares: Tensor,
        terms: Sequence,
        n: Tensor,
        chunk: int,
        ps: list,
    ) -> tuple[Tensor, list[Tensor | None]]:
        sums: Tensor | float = 0.0
        grad_x = torch.empty_like(x)
        grads: list[Tensor | None] = [None] * len(ps)
        for piece in pieces(len(x), chunk):
            leaf = x[piece].detach().requires_grad_()
            with torch.enable_grad():
                mine = self.any_rows(head(unkept(leaf)), targets[piece], shares, terms)
                gx, *gp = gradients(mine.sum(), [leaf, *ps])
            sums = sums + mine.detach()
            grad_x[piece] = gx
            grads = [more(total, g) for total, g in zip(grads, gp, strict=True)]
        return sums / n, [None if g is None else (wide(g) / n).to(g.dtype) for g in (grad_x, *grads)]

    @torch.no_grad()
    def nats(self, head: nn.Module, features: Tensor, targets: Tensor) -> Tensor:
        features, targets = features.flatten(0, -2), targets.flatten()
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        linear = linear_of(head)
        for piece in pieces(len(features), self.chunk or chunk_of(len(features))):
            if linear is None:
                total = total + token_losses(head(features[piece]), targets[piece]).sum(dtype=torch.float64)
            else:
                scores = F.linear(features[piece], linear.weight, linear.bias)
                total = total + self.nats_of(scores, targets[piece], cap=linear.cap)
        return total


def more(total: Tensor | None, g: Tensor | None) -> Tensor | None:
    """total + g, float32 or wider; `total` is used up, None is nothing."""
    if g is None or total is not None:
        return total if g is None else total.add_(g)
    return g.to(torch.promote_types(g.dtype, torch.float32), copy=True)


def pieces(n: int, chunk: int) -> list[slice]:
    """0 … n in chunks."""
    return [slice(start, start + chunk) for start in range(0, n, chunk)]


class _Stored(torch.autograd.Function):
    """The loss of a linear head; its gradients are made with it, undivided by n, and scaled by backward."""

    @staticmethod
    def forward(ctx, features, weight, bias, targets, shares, n, rows, chunk):
        by_features, by_weight, by_bias, *_ = ctx.needs_input_grad
        ctx.dtypes = features.dtype, weight.dtype, None if bias is None else bias.dtype
        dtype = autocast_dtype(features.device) or features.dtype
        total = torch.promote_types(weight.dtype, torch.float32)
        with without_autocast(features.device):
            x, w = features.to(dtype), weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            sums = grad_w = grad_b = None
            grad_x = torch.empty_like(features) if by_features else None
            for piece in pieces(len(x), chunk):
                mine, slope = rows(F.linear(x[piece], w, b), targets[piece], shares)
                sums = mine if sums is None else sums + mine
                if by_features:
                    grad_x[piece] = slope @ w
                if by_weight:
                    grad_w = plus_product(grad_w, slope, x[piece], total)
                if by_bias:
                    grad_b = slope.sum(0, dtype=total) if grad_b is None else grad_b + slope.sum(0, dtype=total)
                del slope
        ctx.save_for_backward(n, grad_x, grad_w, grad_b)
        means = sums / n
        ctx.mark_non_differentiable(means)
        return means.sum(), means

    @staticmethod
    def backward(ctx, grad, _):
        n, *grads = ctx.saved_tensors
        return *given_back(grads, ctx.dtypes, grad / n), None, None, None, None, None


def plus_product(total: Tensor | None, slope: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + slopeᵀ x, in `dtype`: (n, V) and (n, D) -> (V, D); `total` is used up, None is zero."""
    if slope.dtype == dtype:
        return slope.T @ x if total is None else total.addmm_(slope.T, x)
    if widens(slope.device.type, slope.dtype):
        if total is None:
            return torch.mm(slope.T, x, out_dtype=dtype)
        return torch.addmm(total, slope.T, x, out_dtype=dtype)
    product = slope.T @ x
    return product.to(dtype) if total is None else total.add_(product)


@cache
def widens(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices can be made in float32 here without rounding in between (on CUDA)."""
    if device != "cuda":
        return False
    small = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(torch.mm(small, small, out_dtype=torch.float32), small, small, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True
