"""DeMo: each rank keeps a momentum of its own, and sends only the largest cosine coefficients of it.

Source   Peng, Quesnelle, Kingma 2024, arXiv:2411.19870; what it leaves open as in the authors' program, github.com/bloc97/DeMo
Formula  of rank i, with the gradient G_i of its own batches:  Δ_i <- β Δ_i + η G_i
         Q_i = of each tile of the orthonormal DCT-II of Δ_i, the `topk` coefficients of largest magnitude
         Δ_i <- Δ_i - DCT⁻¹(Q_i);   Q = of each coefficient, the mean over the ranks that sent it
         W <- (1 - η λ) W - η sign(DCT⁻¹(Q))
         η enters Δ, too: a constant factor drops out in the sign, so that of it only the schedule's course counts.
Differs  from the program: ranks are added in their order, which gives all replicas the same bits; Δ is part of the state, and
         float32 or wider, since β = 0.999 would do nothing in bfloat16; dimensions past the second join the columns; an index is
         sent in 2 bytes where they suffice, and all of it in one message
Cost     one number a parameter of state, on each rank another; three transforms of every parameter a step
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from blagpt_pl.optim.base import Check, GroupOptimizer, decay_, not_negative, wide
from blagpt_pl.optim.dct import as_matrix, chunk_of, dct, from_tiles, inverse_dct, to_tiles
from blagpt_pl.optim.orthogonal import all_gather
from blagpt_pl.optim.placed import ranks_of
from blagpt_pl.optim.residuals import gathered, row_of

AT_ONCE = 2**24  # numbers that are transformed together, so that little memory is needed beside the state


class Bundle(NamedTuple):
    """What this rank sends of parameters whose tiles are of one shape."""

    params: list[Tensor]
    group: dict[str, Any]
    tile: tuple[int, int]  # a, b
    values: Tensor  # (n, k), of all their n tiles
    indices: Tensor  # (n, k), in 0 … a b - 1


class DeMo(GroupOptimizer):
    """Decoupled momentum; under DDP it exchanges what it needs itself, and gradients stay where they are.

    Attributes:
        local_gradients: gradients must not be averaged over ranks before the step (`sharding.keep_gradients_local`).
        bytes_sent: of this rank in the last step, the message that every other rank receives; 0 where it is alone.

    Args:
        params: parameters or groups, whole on every rank; the same ones have a gradient on all ranks.
        lr: η, by which each weight moves in a step, since the update is a sign.
        beta: β, what is kept of the momentum from step to step.
        topk: coefficients sent of each tile.
        chunk: most rows and columns of a tile; the largest divisor of a dimension that is no larger is taken.
        weight_decay: λ, decoupled.

    Raises:
        ValueError: a value out of its range, or parameters that are sharded.
    """

    local_gradients = True

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        beta: float = 0.999,
        topk: int = 32,
        chunk: int = 64,
        weight_decay: float = 0.0,
    ) -> None:
        self.bytes_sent = 0
        self._bundles: list[Bundle] = []
        values = {"lr": lr, "beta": beta, "topk": topk, "chunk": chunk, "weight_decay": weight_decay}
        super().__init__(params, values)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take in a group of whole parameters."""
        super().add_param_group(param_group)
        if any(isinstance(p, DTensor) for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(
                "DeMo: parameters are sharded, and FSDP2 averages gradients where it shards them (expected those of each "
                "rank); fix: trainer.strategy: ddp, or another optimizer"
            )

    def ranges(self, group: Mapping[str, Any]) -> dict[str, Check]:
        beta, topk, chunk = group["beta"], group["topk"], group["chunk"]
        return {
            "lr": not_negative(group["lr"]),
            "beta": (beta, 0 <= beta < 1, "a number in [0, 1)"),
            "chunk": (chunk, chunk >= 1, "1 or more"),
            "topk": (topk, 1 <= topk <= chunk**2, f"1 to {chunk**2}, the numbers of a tile"),
            "weight_decay": not_negative(group["weight_decay"]),
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, for which all ranks meet once; returns what the closure does."""
        self._bundles = []
        loss = super().step(closure)
        bundles, self._bundles = self._bundles, []
        if bundles:
            for bundle, (values, indices) in zip(bundles, self.exchanged(bundles), strict=True):
                descend(bundle, mean_of(bundle, values, indices))
        return loss

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Take the gradients into the momenta, and out of these what is to be sent."""
        residuals = self.residuals(params)
        torch._foreach_mul_(residuals, group["beta"])
        torch._foreach_add_(residuals, [p.grad for p in params], alpha=group["lr"])
        for tile, places in batches(params, group["chunk"]):
            ours = [residuals[i] for i in places]
            coefficients = dct(torch.cat([to_tiles(r, *tile) for r in ours])).flatten(1)
            indices = coefficients.abs().topk(min(group["topk"], coefficients.shape[1]), sorted=False).indices
            values = coefficients.gather(1, indices)
            sent = torch.zeros_like(coefficients).scatter_(1, indices, values)
            torch._foreach_sub_(ours, untiled(inverse_dct(sent.unflatten(1, tile)), ours))
            bundle = Bundle([params[i] for i in places], group, tile, values, indices.to(index_type(tile)))
            self._bundles.append(bundle)

    def exchanged(self, bundles: list[Bundle]) -> list[tuple[Tensor, Tensor]]:
        """Of each bundle the values and the indices of all ranks, (ranks, n, k) each."""
        ranks = ranks_of(bundles[0].params[0])
        self.bytes_sent = 0
        if ranks is None:
            return [(bundle.values[None], bundle.indices[None]) for bundle in bundles]
        parts = [part for bundle in bundles for part in (bundle.values, bundle.indices)]
        found, self.bytes_sent = gather_all(parts, ranks)
        return list(zip(found[::2], found[1::2], strict=True))

    # ------------------------------------------------------------------ state

    def residuals(self, params: list[Tensor]) -> list[Tensor]:
        """What is still to be sent of each parameter's momentum, on this rank; zero before the first step."""
        for p in params:
            if "delta" not in self.state[p]:
                self.state[p]["delta"] = torch.zeros_like(p, dtype=wide(p.dtype))
        return [self.state[p]["delta"] for p in params]

    def state_dict(self) -> dict[str, Any]:
        """torch's layout; `delta` has one row more for each rank. All ranks must call it, and only rank 0 is given the rows."""
        saved = super().state_dict()
        state = {key: {**one, "delta": gathered(one["delta"])} for key, one in sorted(saved["state"].items())}
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up this rank's row of each `delta`; the mean of all rows where there were more ranks, or fewer.

        Raises:
            ValueError: there are no rows.
        """
        state = state_dict["state"]
        rows = {key: row_of(one.get("delta")) for key, one in state.items()}
        if any(changed for _, changed in rows.values()):
            warnings.warn(
                "DeMo: saved by another number of ranks; each one goes on with the mean of their momenta, so this run is "
                "not bit by bit the one that was interrupted",
                stacklevel=2,
            )
        rest = {key: {k: v for k, v in one.items() if k != "delta"} for key, one in state.items()}
        super().load_state_dict({**state_dict, "state": rest})
        keys = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for key, p in zip(keys, chain.from_iterable(group["params"] for group in self.param_groups), strict=True):
            if key in rows:
                self.state[p]["delta"] = rows[key][0].to(p.device, wide(p.dtype), copy=True)


def index_type(tile: tuple[int, int]) -> torch.dtype:
    """The smallest integer that numbers the places of a tile."""
    return torch.int16 if tile[0] * tile[1] <= 2**15 else torch.int32


def batches(params: list[Tensor], chunk: int) -> list[tuple[tuple[int, int], list[int]]]:
    """Tile shapes (a, b), each with the places of parameters that are transformed together."""
    found: dict[tuple, list[list[int]]] = {}
    for i, p in enumerate(params):
        rows, columns = as_matrix(p.shape)
        runs = found.setdefault((chunk_of(rows, chunk), chunk_of(columns, chunk), wide(p.dtype), p.device), [[]])
        if runs[-1] and sum(params[j].numel() for j in runs[-1]) + p.numel() > AT_ONCE:
            runs.append([])
        runs[-1].append(i)
    return [((a, b), run) for (a, b, *_), runs in found.items() for run in runs]


def untiled(tiles: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tiles (n, a, b) of several tensors, one after the other -> those tensors."""
    counts = [x.numel() // tiles[0].numel() for x in like]
    return [from_tiles(own, x.shape) for own, x in zip(tiles.split(counts), like, strict=True)]


def gather_all(parts: list[Tensor], ranks: ProcessGroup) -> tuple[list[Tensor], int]:
    """Tensors of any dtypes, of one shape each on all ranks -> the same with a first dimension of ranks, and a message's bytes."""
    order = sorted(
        range(len(parts)), key=lambda i: -parts[i].element_size()
    )  # so that each begins at a multiple of its size
    message = torch.cat([parts[i].reshape(-1).view(torch.uint8) for i in order])
    received = message.new_empty(ranks.size() * len(message))
    all_gather(received, message, group=ranks)
    found, start = list(parts), 0
    for i in order:
        end = start + parts[i].numel() * parts[i].element_size()
        own = received.view(ranks.size(), -1)[:, start:end].clone(memory_format=torch.contiguous_format)
        found[i] = own.view(parts[i].dtype).view(ranks.size(), *parts[i].shape)
        start = end
    return found, len(message)


def mean_of(bundle: Bundle, values: Tensor, indices: Tensor) -> Tensor:
    """(ranks, n, k) twice -> (n, a, b): each coefficient's mean over the ranks that sent it, 0 where nobody did.

    Ranks are added in their order and a rank sends a coefficient once, so that the sum has the same bits everywhere.
    """
    total = values.new_zeros(values.shape[1], bundle.tile[0] * bundle.tile[1])
    if len(values) == 1:
        return total.scatter_(1, indices[0].long(), values[0]).unflatten(1, bundle.tile)
    senders = torch.zeros_like(total)
    for own, at in zip(values, indices.long(), strict=True):
        total.scatter_add_(1, at, own)
        senders.scatter_add_(1, at, torch.ones_like(own))
    return total.div_(senders.clamp_(min=1)).unflatten(1, bundle.tile)


def descend(bundle: Bundle, mean: Tensor) -> None:
    """W <- (1 - η λ) W - η sign(DCT⁻¹(mean)), in place."""
    lr = bundle.group["lr"]
    decay_(bundle.params, lr * bundle.group["weight_decay"])
    steps = untiled(inverse_dct(mean).sign_(), bundle.params)
    steps = [step.to(p.dtype) for step, p in zip(steps, bundle.params, strict=True)]
    torch._foreach_add_(bundle.params, steps, alpha=-lr)
