"""Blocks one after the other over one stream, of which a model may have several, each of a width and a length of its own."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, Site, built
from blagpt_pl.nn.block import Block

BlockFactory = Callable[[Site], Block]


def stack(socket: str, block: BlockFactory, site: Site, layers: Iterable[int] | None = None) -> nn.ModuleList:
    """Blocks, each told which one it is.

    Args:
        socket: where the block is set, for the error.
        block: builds one.
        site: what they share; its `n_layers` is the number of all blocks of the model.
        layers: the numbers of these among all; all of them by default.
    """
    numbers = range(site.n_layers) if layers is None else layers
    return nn.ModuleList(built(socket, block, replace(site, layer=layer)) for layer in numbers)


def through(blocks: Iterable[nn.Module], x: Tensor, carry: Carry) -> Tensor:
    """(B, T, D) -> (B, T, D): one block after the other."""
    for block in blocks:
        x = block(x, carry)
    return x
