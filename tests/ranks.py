"""Two processes that train together over gloo: what the tests of ranks share."""

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RANKS = 2


class Objective(nn.Module):
    """The objective as a forward, which is where DDP listens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.model.objective(tokens, targets)[0]


def full(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of parameters, whole where they are sharded."""
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in values.items()}


@contextmanager
def joined(rank: int, folder: Path) -> Iterator[tuple[DeviceMesh, dict]]:
    """One rank of two: the mesh, and a dictionary that is written down at the end."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    results: dict = {}
    yield init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("data_parallel", "tensor_parallel")), results
    torch.save(results, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def run(work: Callable[[int, Path], None], folder: Path) -> list[dict]:
    """Run `work(rank, folder)` in a process for each rank; what each has written down in `joined`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blagpt_pl.lab.train"])  # one server for the whole suite
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * RANKS
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(RANKS)]
