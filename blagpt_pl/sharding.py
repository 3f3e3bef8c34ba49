"""Sharding with FSDP2: every region alone, then the whole; and backward passes that keep their gradients at home.

Of a micro-batch (`without_sync`), or always, for an optimizer that exchanges by itself (`keep_gradients_local`).

Source   Zhao et al. 2023, arXiv:2304.11277; torch's `fully_shard`
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

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


def wants_local_gradients(optimizer: Optimizer) -> bool:
    """Whether an optimizer says that ranks must not share their gradients, since it exchanges something else itself."""
    return getattr(optimizer, "local_gradients", False)


def keep_gradients_local(model: nn.Module, scaled: bool = False) -> None:
    """Let DDP leave each rank's gradients as they are: those of its own batches, divided by nothing.

    Args:
        model: as the strategy of a run on several ranks has wrapped it, before its first backward pass.
        scaled: whether a loss scaler decides, on each rank alone, if a step is taken.

    Raises:
        ConfigError: the model is not DDP's, DDP exchanges in a way of its own, or ranks could take different steps.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ConfigError(
            "trainer.strategy: exchanges gradients in the backward pass (expected DDP beside an optimizer that exchanges "
            "by itself); fix: trainer.strategy: ddp"
        )
    if scaled:
        raise ConfigError(
            "trainer.precision: 16-mixed skips a step on that rank alone whose gradients overflow (expected steps that all "
            "ranks take); fix: trainer.precision: bf16-mixed"
        )
    try:
        model.register_comm_hook(None, noop_hook)
    except RuntimeError as error:
        raise ConfigError(
            "trainer.strategy: DDP has a communication hook already (expected none beside an optimizer that exchanges by "
            "itself); fix: no ddp_comm_hook"
        ) from error
