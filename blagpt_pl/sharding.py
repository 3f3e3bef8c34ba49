"""Sharding with FSDP2: every region alone, then the whole; and backward passes that keep their gradients at home.

Source   Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from blagpt_pl.errors import ConfigError

ENTRIES = ("objective", "measure", "next_logits")  # beside forward: where a whole model is entered


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been at work."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, regions: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a model, in place, over the data-parallel ranks of a mesh.

    Raises:
        ConfigError: the mesh also splits tensors, which no model here does.
    """
    if mesh["tensor_parallel"].size() > 1:
        raise ConfigError(
            f"trainer.strategy: tensor_parallel_size is {mesh['tensor_parallel'].size()} (expected 1); fix: set "
            f"data_parallel_size: {mesh.size()} and tensor_parallel_size: 1"
        )
    for region in regions:
        fully_shard(region, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    for entry in ENTRIES:
        register_fsdp_forward_method(model, entry)


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Backward of a micro-batch that is not the step's last: gradients stay on this rank.

    DDP needs nothing: its hooks wake only after its forward, which is a whole training step. FSDP2 is told.
    """
    sharded = is_sharded(model)
    if sharded:
        model.set_requires_gradient_sync(False)
    yield
    if sharded:
        model.set_requires_gradient_sync(True)
