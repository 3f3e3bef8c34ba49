"""Memory policies: what a region keeps of its forward pass for its backward pass, and what it computes again instead.

RecomputeBlocks  keep a block's input alone and run the block again in the backward pass (activation checkpointing)
Budget           let the compiler recompute what is cheap, down to a share of what it would have kept
Source   Chen, Xu, Zhang & Guestrin 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, §3-4; torch's
         `utils.checkpoint` (non-reentrant) and `_functorch.config.activation_memory_budget`
Differs  a fixed segment of one block, not √n of them
Cost     RecomputeBlocks: one more forward of each block, less its last product; keeps its input, D numbers a token and layer,
         and the activations of one block. Budget: what it recomputes is elementwise as long as that is enough
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blagpt_pl.nn.base import Carry

PARTITIONED = ("inductor", "aot_eager", "aot_eager_decomp_partition")  # backends whose compiler chooses what is kept


class MemoryPolicy:
    """How the regions of a model trade memory against time; what is computed stays the same."""

    def check(self, backend: str | Callable | None) -> None:
        """Refuse to be used where it would do nothing, or not what it says.

        Args:
            backend: of torch.compile, None where nothing is compiled; a function is taken at its word.

        Raises:
            ValueError: it is of no use there.
        """

    def on_region(self, region: nn.Module) -> None:
        """Change a region in place, before it is compiled and sharded."""

    def backend(self, backend: str | Callable) -> str | Callable:
        """What compiles the regions, in the place of this backend."""
        return backend


class RecomputeBlocks(MemoryPolicy):
    """Run each block again in the backward pass, from its input; dropout and autocast are as they were."""

    def check(self, backend: str | Callable | None) -> None:
        if isinstance(backend, str) and backend not in PARTITIONED:  # torch keeps no random state for these
            raise ValueError(
                f"model.memory: RecomputeBlocks would draw other dropout masks with model.compile={backend!r} "
                f"(expected none, or one of {', '.join(PARTITIONED)})"
            )

    def on_region(self, region: nn.Module) -> None:
        if not isinstance(region, Recomputed):
            region.__class__ = recomputed(type(region))  # keeps hooks, names, `isinstance`, and what FSDP2 does later


class Budget(MemoryPolicy):
    """Let the compiler keep at most this share of what it would keep, besides what goes into a region.

    It first recomputes what is elementwise and, only if that is not enough, matrix products and attention. Where the
    weights of a region are larger than its activations, as with few tokens, nothing changes.

    Args:
        fraction: the share.

    Raises:
        ValueError: no share between 0 and 1; later, a model that is not compiled.
    """

    def __init__(self, fraction: float = 0.9) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"Budget.fraction: {fraction} (expected a share above 0 and below 1, such as 0.9)")
        self.fraction = float(fraction)

    def check(self, backend: str | Callable | None) -> None:
        if backend not in PARTITIONED and not callable(backend):
            raise ValueError(
                f"model.memory: Budget has no effect with model.compile={backend!r}; fix: model.compile of "
                f"{', '.join(PARTITIONED)}, or leave model.memory out"
            )

    def backend(self, backend: str | Callable) -> Callable:
        compiler = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend

        def within_budget(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable:
            with torch._functorch.config.patch(activation_memory_budget=self.fraction):
                return compiler(graph, inputs)

        return within_budget


class Recomputed(nn.Module):
    """A block that keeps only what it is given: x (B, T, D), x0 and the memo's tensors, which others keep anyway."""

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, carry)
        names, empty = tuple(carry.memo), carry.but(memo={})  # the carry itself would be kept by what it will hold

        def run(x: Tensor, x0: Tensor, *memo: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            """A function of tensors alone: what the block leaves in the memo is returned."""
            inner = empty.but(x0, dict(zip(names, memo, strict=True)))
            y = super(Recomputed, self).forward(x, inner)
            return y, inner.memo

        y, memo = checkpoint(run, x, carry.x0, *carry.memo.values(), use_reentrant=False)
        carry.memo.clear()
        carry.memo.update(memo)
        return y


@cache
def recomputed(cls: type[nn.Module]) -> type[nn.Module]:
    """The same module, recomputed."""
    return type(f"Recomputed{cls.__name__}", (Recomputed, cls), {"__module__": cls.__module__})
