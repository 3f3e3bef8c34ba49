"""The token stream: which tokens a rank reads at a step, as a pure function.

Formula  n = (N - 1) // T windows an epoch; sample s is window π(s mod n) of epoch s // n; window w is tokens
         [w·T, w·T + T]. Micro-batch g = m·world + rank of step k holds samples k·B + g·b … k·B + g·b + b - 1.
Differs  from a DataLoader: there is no position to save. Resuming, or another number of ranks, is starting at another
         step: nothing is repeated, nothing is lost, and 1 rank × 2 micro-batches sees what 2 ranks × 1 see.
Cost     less than T tokens at the end of the shards are never a target; a shuffled epoch takes 4 bytes a window, and 0.1 s
         a million windows when it begins, in the reading thread, which lets go of the interpreter meanwhile
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blagpt_pl.data.buffers import Event, HostBuffers, pageable, pinned
from blagpt_pl.data.shards import ShardSet
from blagpt_pl.errors import ConfigError

PADDING = -1  # a token that is not there, in a window
IGNORE = -100  # a target that does not count, as torch's cross_entropy has it
AHEAD = 2  # steps read ahead: with one, a short step waits until the reading thread gets its turn of the interpreter


class TokenStream:
    """Sample index -> window of T + 1 tokens. `shuffle_seed=None` keeps the order of the files."""

    def __init__(self, shards: ShardSet, context: int, shuffle_seed: int | None) -> None:
        self.shards = shards
        self.context = context
        self.shuffle_seed = shuffle_seed
        self.n_windows = (shards.n_tokens - 1) // context
        self._epoch_order: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """The permutation of an epoch's windows; the latest is kept, since a step touches one epoch, rarely two."""
        assert self.shuffle_seed is not None
        if self._epoch_order is not None and self._epoch_order[0] == epoch:
            return self._epoch_order[1]
        order = np.arange(self.n_windows, dtype=np.int32 if self.n_windows < 2**31 else np.int64)
        np.random.default_rng([self.shuffle_seed, epoch]).shuffle(order)
        self._epoch_order = epoch, order
        return order

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """Window numbers of any sample indices, 0-based and unbounded."""
        samples = np.asarray(samples, np.int64)
        if self.shuffle_seed is None:
            return samples % self.n_windows
        epochs, windows = np.divmod(samples, self.n_windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            windows[here] = self.order(int(epoch))[windows[here]]
        return windows

    def read(self, samples: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """(n,) sample indices -> (n, T + 1) int32 tokens, in `out` if it is given."""
        if out is None:
            out = np.empty((len(samples), self.context + 1), np.int32)  # (n, T+1)
        self.shards.read_windows(self.windows(samples) * self.context, out)
        return out


def rank_samples(step: int, rank: int, world: int, batch_size: int, device_batch_size: int) -> np.ndarray:
    """Sample indices, (A, b) int64, of one rank at one optimizer step."""
    micro_batches = np.arange(batch_size // (device_batch_size * world), dtype=np.int64) * world + rank  # (A,)
    return step * batch_size + micro_batches[:, None] * device_batch_size + np.arange(device_batch_size)  # (A, b)


def check_batch(batch_size: int, device_batch_size: int, world: int) -> int:
    """The number of micro-batches a rank accumulates; an error where it is not whole."""
    unit = device_batch_size * world
    if batch_size % unit == 0 and batch_size > 0:
        return batch_size // unit
    sizes = [n for n in (batch_size // unit * unit, (batch_size // unit + 1) * unit) if n > 0]
    per_rank = batch_size // world if batch_size % world == 0 else 0
    fits = [b for b in range(1, per_rank + 1) if per_rank % b == 0]
    near = sorted(sorted(fits, key=lambda b: abs(b - device_batch_size))[:3])
    or_device = f", or data.device_batch_size to one of {near}" if near else ""
    raise ConfigError(
        f"data.batch_size: {batch_size} (expected a multiple of {unit} = data.device_batch_size {device_batch_size} × "
        f"{world} ranks); fix: set data.batch_size to one of {sizes}{or_device}"
    )


class TrainBatches:
    """Endless: for each optimizer step, one int32 tensor (A, b, T + 1) of this rank's micro-batches.

    It has no `__len__` on purpose: to Lightning the run is one endless epoch (`max_epochs: -1`), so no epoch edge ever
    restarts it, and Lightning asks no sized loader for a position. The position is the step: `start_step` is read at
    each `iter()`, and resuming is starting there. A thread reads the next steps while this one computes.

    Args:
        start_step: the step, or a function that tells it when iteration starts.
        pin_for: the CUDA device whose copies read the batches, or None.
        allocate: shape -> int32 tensor that a batch is read into; None: pinned if `pin_for` is given, else not. What was
            handed out is overwritten only after it has been given back (`give_back`).
    """

    def __init__(
        self,
        stream: TokenStream,
        batch_size: int,
        device_batch_size: int,
        rank: int,
        world: int,
        start_step: int | Callable[[], int] = 0,
        pin_for: torch.device | None = None,
        allocate: Callable[[tuple[int, ...]], Tensor] | None = None,
    ) -> None:
        check_batch(batch_size, device_batch_size, world)
        self.stream = stream
        self.batch_size = batch_size
        samples = rank_samples(0, rank, world, batch_size, device_batch_size)  # (A, b)
        self.first_samples = samples.reshape(-1)  # (A·b,)
        self.start_step = start_step
        self.pin_for = pin_for
        if allocate is None:
            allocate = pageable if pin_for is None else pinned
        self.buffers = HostBuffers(allocate, (*samples.shape, stream.context + 1))

    def batch(self, step: int) -> Tensor:
        """(A, b, T + 1) int32: what this rank trains on at `step`."""
        tokens = self.buffers.take()  # (A, b, T+1)
        samples = self.first_samples + step * self.batch_size
        self.stream.read(samples, tokens.numpy().reshape(len(samples), -1))  # (A·b, T+1)
        return tokens

    def give_back(self, batch: Tensor, copied: Event) -> None:
        """Let a batch be overwritten once `copied`, recorded behind its copy to the device, is over."""
        self.buffers.give_back(batch, copied)

    def __iter__(self) -> Iterator[Tensor]:
        start = self.start_step() if callable(self.start_step) else self.start_step
        # a new thread's current device is GPU 0: pinning there without this would open a context on it for every rank
        on_device = {} if self.pin_for is None else {"initializer": torch.cuda.set_device, "initargs": (self.pin_for,)}
        with ThreadPoolExecutor(1, "blagpt-data", **on_device) as reader:
            ahead = deque(reader.submit(self.batch, step) for step in range(start, start + AHEAD))
            for step in itertools.count(start + AHEAD):
                ready = ahead.popleft()
                ahead.append(reader.submit(self.batch, step))
                yield ready.result()


class EvalBatch(NamedTuple):
    tokens: Tensor  # (b, T+1) int32, PADDING where there is no token
    n_bytes: Tensor  # () int64: UTF-8 bytes of the valid targets, -1 if unknown


class EvalBatches:
    """Exactly `n_tokens` targets, tokens first + 1 … first + n_tokens, each on one rank once, whatever the layout.

    Window i is row i mod b of global batch i // b, which goes to rank (i // b) mod world. Every rank gets the same
    number of (b, T + 1) batches; the last window may be partial, and rows beyond it are all padding.
    """

    def __init__(
        self,
        shards: ShardSet,
        first: int,
        n_tokens: int,
        context: int,
        batch_size: int,
        rank: int,
        world: int,
        byte_lengths: np.ndarray | None = None,
        pin: bool = False,
    ) -> None:
        assert n_tokens > 0 and first + n_tokens < shards.n_tokens, "the caller counts the tokens"
        self.shards = shards
        self.first = first
        self.n_tokens = n_tokens
        self.context = context
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.byte_lengths = byte_lengths
        self.pin = pin

    def __len__(self) -> int:
        targets_a_round = self.context * self.batch_size * self.world  # one batch on every rank
        return (self.n_tokens + targets_a_round - 1) // targets_a_round

    def __iter__(self) -> Iterator[EvalBatch]:
        for number in range(len(self)):
            first_window = (number * self.world + self.rank) * self.batch_size
            tokens = np.full((self.batch_size, self.context + 1), PADDING, np.int32)  # (b, T+1)
            left = self.n_tokens - first_window * self.context  # targets from here on
            whole = min(max(left, 0) // self.context, self.batch_size)
            starts = self.first + (first_window + np.arange(whole)) * self.context
            self.shards.read_windows(starts, tokens[:whole])
            if whole < self.batch_size and left > whole * self.context:  # the last window is partial
                row = tokens[whole, : left - whole * self.context + 1]
                self.shards.read(self.first + (first_window + whole) * self.context, row)
            batch = EvalBatch(torch.from_numpy(tokens), torch.tensor(self._count_bytes(tokens[:, 1:])))
            yield EvalBatch(*(t.pin_memory() for t in batch)) if self.pin else batch

    def _count_bytes(self, targets: np.ndarray) -> int:
        if self.byte_lengths is None:
            return -1
        return int(self.byte_lengths[targets[targets != PADDING]].sum(dtype=np.int64))


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(…, T + 1) windows -> inputs and targets, (…, T) int64 each: the one place where targets are shifted.

    Padding becomes 0 as an input (no target looks at it) and IGNORE as a target.
    """
    tokens = tokens.long()
    targets = tokens[..., 1:]
    return tokens[..., :-1].clamp(min=0), targets.masked_fill(targets == PADDING, IGNORE)
