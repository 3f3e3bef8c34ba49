"""Where a parameter's numbers are: whole on this rank, or a shard of them (FSDP2), and with whom its work can be shared.

An optimizer that must see whole matrices makes its elementwise sums on what this rank holds (`here`), asks for the whole
(`whole`), and takes its own part back (`mine`). Where nothing is sharded all three are the tensor itself.
"""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor


def here(x: Tensor) -> Tensor:
    """What this rank holds of a tensor; writes go through."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor, like: Tensor) -> Tensor:
    """The full tensor, whose part on this rank is `x`, placed like a parameter."""
    if not isinstance(like, DTensor):
        return x
    placed = DTensor.from_local(x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return placed.full_tensor()


def mine(x: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor that all ranks have, placed like a parameter."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None).to_local()


def summed(parts: Tensor, like: Tensor) -> Tensor:
    """(n,): sums over this rank's parts of n tensors that are placed like a parameter -> over the whole; waits for nothing."""
    if not isinstance(like, DTensor):
        return parts
    partial = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(parts, like.device_mesh, partial).full_tensor()


def ranks_of(p: Tensor) -> ProcessGroup | None:
    """The ranks that all know the parameter's gradient, whole or in shards; None where this one is alone.

    Without shards these are all ranks of the run: DDP has given them one gradient.
    """
    if isinstance(p, DTensor):
        ranks = p.device_mesh.get_group() if p.device_mesh.ndim == 1 else None
    else:
        ranks = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return ranks if ranks is not None and ranks.size() > 1 else None
