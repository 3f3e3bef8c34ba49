"""Low-rank maps that one use of a shared block adds to the block's own: the same weights, a little different each time.

Source   Hu et al. 2021, "LoRA", arXiv:2106.09685, eq. (3), for the map; Glorioso et al. 2024, "Zamba2", arXiv:2411.15242, §2.1,
         for a map of each use of a block
Formula  W x + B A x, with A of r rows and B of as many as W
How      `Adapters` belongs to a use, its maps act in the middle of the block. So it hands copies of them over, which travel in the
         carry's memo to the block: every module's parameters are read in its own forward, as sharding asks (FSDP2 gathers them
         there), and the block is one graph for all of its uses
Differs  from LoRA: trained with the rest, from the start; both matrices start at random, and nothing scales their product
Cost     r (d_in + d_out) weights a map and use, twice as many FLOPs a token; a copy of them a forward pass
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import Carry, StackedLinear
from blagpt_pl.nn.checks import at_least_one


class Adapted(NamedTuple):
    """A linear map that is added to.

    Attributes:
        d_in: width of its input.
        rows: of its outputs, those of each map that it stacks.
        heads: as of `StackedLinear`.
    """

    d_in: int
    rows: tuple[int, ...]
    heads: tuple[int, ...]


class Adapters(nn.Module):
    """What one use adds to the maps of a shared block; the signature is a block's, what comes out is for the block's memo.

    Args:
        maps: what is added to, by name.
        rank: r.

    Raises:
        ValueError: a rank below 1.
    """

    def __init__(self, maps: Mapping[str, Adapted], rank: int) -> None:
        super().__init__()
        at_least_one("model.adapter_rank", rank)
        self.down = nn.ModuleDict({name: nn.Linear(m.d_in, rank, bias=False) for name, m in maps.items()})
        self.up = nn.ModuleDict({name: StackedLinear(rank, m.rows, False, m.heads) for name, m in maps.items()})

    def forward(self, x: Tensor, carry: Carry) -> dict[str, Tensor]:
        """Copies of A and B of every map, as `low_rank` looks them up; what is passing is not read."""
        ends = {"down": self.down, "up": self.up}
        return {f"{name}.{end}": m.weight.clone() for end, maps in ends.items() for name, m in maps.items()}


def low_rank(x: Tensor, name: str, memo: Mapping[str, Tensor]) -> Tensor:
    """B A x of the use whose maps the memo holds: (..., d_in) -> (..., d_out)."""
    return F.linear(F.linear(x, memo[f"{name}.down"]), memo[f"{name}.up"])
