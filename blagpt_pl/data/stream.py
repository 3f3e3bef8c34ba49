"""The token stream: which tokens a rank reads at a step, as a pure function.

Formula  n = (N - 1) // T windows an epoch; sample s is window π(s mod n) of epoch s // n; window w is tokens
         [w·T, w·T + T]. Micro-batch g = m·world + rank of step k holds samples k·B + g·b … k·B + g·b + b - 1.
Differs  from a DataLoader: there is no position to save. Resuming, or another number of ranks, is starting at another
         step: nothing is repeated, nothing is lost, and 1 rank × 2 micro-batches sees what 2 ranks × 1 see.
Cost     less than T tokens at the end of the shards are never a target; 4 bytes a window for a shuffled epoch
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blagpt_pl.data.shards import ShardSet
from blagpt_pl.errors import ConfigError

PADDING = -1  # a token that is not there, in a window
IGNORE = -100  # a target that does not count, as torch's cross_entropy has it


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
        windows = np.arange(self.n_windows, dtype=np.int32 if self.n_windows < 2**31 else np.int64)
        order = np.random.default_rng([self.shuffle_seed, epoch]).permutation(windows)
        self._epoch_order = epoch, order
        return order

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """Window numbers of any sample indices, 0-based and unbounded."""
        epochs, windows = np.divmod(np.asarray(samples, np.int64), self.n_windows)
        if self.shuffle_seed is not None:
            for epoch in np.unique(epochs):
                here = epochs == epoch
                windows[here] = self.order(int(epoch))[windows[here]]
        return windows

    def read(self, samples: np.ndarray) -> np.ndarray:
        """(n,) sample indices -> (n, T + 1) int32 tokens."""
        windows = self.windows(samples)
        tokens = np.empty((len(windows), self.context + 1), np.int32)  # (n, T+1)
        for row, window in zip(tokens, windows.tolist(), strict=True):
            self.shards.read(window * self.context, row)
        return tokens


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
    each `iter()`, and resuming is starting there. A thread reads (and pins) the next step while this one computes.
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
    ) -> None:
        check_batch(batch_size, device_batch_size, world)
        self.stream = stream
        self.layout = {"rank": rank, "world": world, "batch_size": batch_size, "device_batch_size": device_batch_size}
        self.start_step = start_step
        self.pin_for = pin_for

    def batch(self, step: int) -> Tensor:
        """(A, b, T + 1) int32: what this rank trains on at `step`."""
        samples = rank_samples(step, **self.layout)  # (A, b)
        tokens = torch.from_numpy(self.stream.read(samples.reshape(-1))).view(*samples.shape, -1)  # (A, b, T+1)
        return tokens if self.pin_for is None else tokens.pin_memory()

    def __iter__(self) -> Iterator[Tensor]:
        start = self.start_step() if callable(self.start_step) else self.start_step
        # a new thread's current device is GPU 0: pinning there without this would open a context on it for every rank
        on_device = {} if self.pin_for is None else {"initializer": torch.cuda.set_device, "initargs": (self.pin_for,)}
        with ThreadPoolExecutor(1, "blagpt-data", **on_device) as reader:
            ahead = reader.submit(self.batch, start)
            for step in itertools.count(start + 1):
                ready, ahead = ahead, reader.submit(self.batch, step)
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
            for row, window in zip(tokens, range(first_window, first_window + self.batch_size), strict=True):
                done = window * self.context
                n_targets = min(self.context, self.n_tokens - done)
                if n_targets > 0:
                    self.shards.read(self.first + done, row[: n_targets + 1])
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
