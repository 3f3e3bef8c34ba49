"""Blocks one after the other over one stream, of which a model may have several, each of a width and a length of its own."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor, nn

from blagpt_pl.nn.base import Carry, Site, built
from blagpt_pl.nn.block import Block

BlockFactory = Callable[[Site], Block]


def stack(socket: str, block: BlockFactory, site: Site) -> nn.ModuleList:
    """As many blocks as the site has layers, each told which one it is.

    Args:
        socket: where the block is set, for the error.
        block: builds one.
        site: what they share.
    """
    return nn.ModuleList(built(socket, block, replace(site, layer=layer)) for layer in range(site.n_layers))


def through(blocks: Iterable[nn.Module], x: Tensor, carry: Carry) -> Tensor:
    """(B, T, D) -> (B, T, D): one block after the other."""
    for block in blocks:
        x = block(x, carry)
    return x
