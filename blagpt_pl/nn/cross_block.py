"""A block that also reads another stream, after its first branch and before the others.

Source   Vaswani et al. 2017, arXiv:1706.03762, §3.1 (the decoder's layer), pre-norm
Formula  x ← first branch of the block (attention);  x ← x + cross(norm(x), context);  x ← the block's other branches (MLP)
Differs  no dropout and no post-norm on what is read; the block's own branches have whatever the block has
Cost     that of the block, and of one norm and one cross-attention
"""

from torch import Tensor, nn

from blagpt_pl.nn.attention.cross import Cross, CrossFactory
from blagpt_pl.nn.base import Carry, NormFactory, Part, Site, built
from blagpt_pl.nn.block import Block, Branch
from blagpt_pl.nn.stack import BlockFactory

CONTEXT = "context"  # where the carry's memo holds the other stream


class ReadContext(Part):
    """What a stream (B, T, D) reads from the other one, which travels beside it: `carry.memo["context"]`, (B, S, D).

    Args:
        cross: how it reads.
    """

    def __init__(self, cross: Cross) -> None:
        super().__init__()
        self.cross = cross

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return self.cross(x, carry.memo[CONTEXT])


class CrossBlock(nn.Module):
    """A block around one more branch: (x, carry) -> y, both (B, T, D), with the other stream in `carry.memo["context"]`.

    Args:
        site: where it stands.
        block: the block whose branches these are.
        cross: how the other stream is read; all of it by every position.
        norm: normalisation of what reads.

    Raises:
        ValueError: a block that is more than its branches one after the other: nothing could stand between them.
    """

    def __init__(self, site: Site, block: BlockFactory, cross: CrossFactory, norm: NormFactory) -> None:
        super().__init__()
        self.block = built("model.block", block, site)
        if getattr(type(self.block), "forward", None) is not Block.forward:
            raise ValueError(
                f"layer {site.layer}: model.block: {type(self.block).__name__} joins its branches in a way of its own, "
                "so that no other can stand between them (expected Block, or a subclass with other `branches`)"
            )
        part = ReadContext(built("model.cross", cross, site, None))
        self.cross = Branch(built("model.norm", norm, site.d_model), part, None, nn.Identity())

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        first, *rest = self.block.branches()
        x = self.cross(first(x, carry), carry)
        for branch in rest:
            x = branch(x, carry)
        return x
