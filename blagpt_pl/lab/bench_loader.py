"""`blagpt bench loader`: what a batch costs that is read by `TrainBatches`, and by a `DataLoader`.

All read the same shard of random tokens, which the benchmark writes and removes, from the page cache. A round of a case is a
burst of batches after a pause, and what was read ahead during the pause does not count: it is the rate that can be
sustained, while a training step also hides up to a step of it. The first rows are what training does; the last one only
copies a slice of a memory map, the least that any loader does, but a file that shrinks would kill it.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.bench_report import Column, Report, bars
from blagpt_pl.lab.timing import Case, spread, timed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from blagpt_pl.data import Shard, TrainBatches

WHAT = "reading a batch of tokens: our loader, torch's DataLoader, a memory map"
TOKENS = {"small": 10_000_000, "full": 100_000_000}
VOCABULARY = 50257
BURST = 20  # batches
PAUSE_S = 0.02  # before a burst, until what the case before it reads ahead is read
REFERENCE = "DataLoader, sample by sample"
COLUMNS = [
    Column("name", ""),
    Column("median_us", "us a batch", ",.1f"),
    Column("m_tokens_per_s", "M tokens/s", ",.0f"),
    Column("ratio", "to sample by sample", ".3f"),
]


@dataclass(frozen=True)
class Reader:
    """A row: what gives the next batch, and how many of them it reads ahead."""

    name: str
    read: Callable[[], object]
    ahead: int = 0

    def burst(self) -> float:
        """Milliseconds a batch."""
        time.sleep(PAUSE_S)
        for _ in range(self.ahead):
            self.read()
        start = time.perf_counter()
        for _ in range(BURST):
            self.read()
        return 1e3 * (time.perf_counter() - start) / BURST


class Windows:
    """A usual dataset: an item is one window, (T + 1,) int64.

    Args:
        rows: an item is that many windows at once, (rows, T + 1).
        pairs: an item is inputs and targets, (T,) int64 each, as most training loops have it.
    """

    def __init__(self, shard: "Shard", context: int, rows: int | None = None, pairs: bool = False) -> None:
        self.shard, self.context, self.rows, self.pairs = shard, context, rows, pairs

    def __len__(self) -> int:
        return (self.shard.n_tokens - 1) // self.context // (self.rows or 1)

    def __getitem__(self, item: int) -> "torch.Tensor | tuple[torch.Tensor, torch.Tensor]":
        import numpy as np
        import torch

        tokens, ahead = mapped(self.shard), self.context
        if self.rows is None:
            window = torch.from_numpy(tokens[item * ahead : item * ahead + ahead + 1].astype(np.int64))
            return (window[:-1], window[1:]) if self.pairs else window
        run = tokens[item * self.rows * ahead : (item + 1) * self.rows * ahead + 1].astype(np.int64)
        return torch.from_numpy(np.concatenate([run[:-1].reshape(-1, ahead), run[ahead::ahead, None]], 1))


class Cycle:
    """A sampler without an end, so that no row pays for the end of an epoch."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(self.n))


_maps: dict[Path, "np.ndarray"] = {}  # one a process, as a dataset would open it


def mapped(shard: "Shard") -> "np.ndarray":
    """The tokens of a shard, mapped into memory."""
    import numpy as np

    from blagpt_pl.data.shards import HEADER_BYTES

    if shard.path not in _maps:
        _maps[shard.path] = np.memmap(shard.path, shard.dtype, "r", HEADER_BYTES)
    return _maps[shard.path]


def options(p: argparse.ArgumentParser) -> None:
    """What `blagpt bench loader` alone takes."""
    p.add_argument("--device-batch-size", type=int, default=64, metavar="B", help="windows a batch  (64)")
    p.add_argument("--context", type=int, default=1024, metavar="T", help="tokens a window  (1024)")
    p.set_defaults(repeats=15, warmup=2)


def measure(args: argparse.Namespace, device: "torch.device") -> Report:
    """Time a batch of each loader, in turn.

    Raises:
        ConfigError: an option is out of its range.
    """
    import numpy as np

    from blagpt_pl.data import write_shard

    b, context, n_tokens = args.device_batch_size, args.context, TOKENS[args.size]
    for name, value in {"device-batch-size": b, "context": context}.items():
        if value < 1:
            raise ConfigError(f"--{name}: {value} (expected 1 or more)")
    if b * context >= n_tokens:
        raise ConfigError(
            f"--device-batch-size {b} x --context {context}: {b * context} tokens (expected < {n_tokens}, --size {args.size})"
        )
    with tempfile.TemporaryDirectory(prefix="blagpt-bench-") as folder, ExitStack() as stack:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, n_tokens, dtype=np.uint16)
        shard = write_shard(f"{folder}/tokens.bin", tokens, VOCABULARY)
        stack.callback(_maps.pop, shard.path, None)
        readers = list(readers_of(shard, b, context, device, stack))
        times = timed([Case(r.name, r.burst, itself=True) for r in readers], args.repeats, args.warmup, device)
    rows = [{"name": r.name, "batch": b, "context": context, **spread(t)} for r, t in zip(readers, times, strict=True)]
    reference = next(row["median_ms"] for row in rows if row["name"] == REFERENCE)
    for row in rows:
        row["median_us"] = 1e3 * row["median_ms"]
        row["m_tokens_per_s"] = 1e-3 * b * context / row["median_ms"]
        row["ratio"] = row["median_ms"] / reference
    return Report(
        f"loader: a batch of {b} x ({context} + 1) tokens, from {n_tokens / 1e6:.0f} M tokens in the page cache",
        COLUMNS,
        rows,
        [
            f"Bursts of {BURST} batches; what was read ahead before a burst does not count.",
            "A batch is windows, (B, T + 1), which ours leaves to the device to widen and to part into inputs and targets.",
            "Demand: 0.43 to 0.87 M tokens/s a GPU (computed: 911 MFLOP a token at 50 % and 100 % of 790 TFLOP/s).",
        ],
        partial(bars, rows=rows, label="name", panels=[("median_us", "us a batch"), ("ratio", "to sample by sample")]),
    )


def readers_of(shard: "Shard", b: int, context: int, device: "torch.device", stack: ExitStack) -> Iterator[Reader]:
    """The rows; `stack` ends their threads and processes."""
    from torch.utils.data import DataLoader

    windows, whole = Windows(shard, context), Windows(shard, context, b)
    by_sample = {"dataset": windows, "batch_size": b, "sampler": Cycle(len(windows))}
    # a fork of this process could inherit a lock that one of its threads holds
    workers = iter(DataLoader(**by_sample, num_workers=2, multiprocessing_context="forkserver"))
    if stop := getattr(workers, "_shutdown_workers", None):
        stack.callback(stop)
    for name, seed in (("file order", None), ("shuffled", 0)):
        alone = ours(shard, b, context, seed)
        steps = itertools.count()
        yield Reader(f"ours, {name}", lambda alone=alone, steps=steps: alone.batch(next(steps)))
        threaded = stack.enter_context(closing(iter(ours(shard, b, context, seed))))
        yield Reader(f"ours, {name}, by its thread", partial(next, threaded), ahead=3)
    if device.type == "cuda":
        batches = ours(shard, b, context, None, device)
        source = stack.enter_context(closing(iter(batches)))
        yield Reader("ours, file order, by its thread, to the GPU", partial(moved, batches, source, device), ahead=3)
        pinned = iter(DataLoader(**by_sample, pin_memory=True))
        yield Reader(f"{REFERENCE}, to the GPU", lambda: next(pinned).to(device, non_blocking=True))
    yield Reader(REFERENCE, partial(next, iter(DataLoader(**by_sample))))
    pairs = DataLoader(**{**by_sample, "dataset": Windows(shard, context, pairs=True)})
    yield Reader(f"{REFERENCE}, inputs and targets", partial(next, iter(pairs)))
    yield Reader(f"{REFERENCE}, 2 workers", partial(next, workers), ahead=4)
    batchwise = DataLoader(whole, batch_size=None, sampler=Cycle(len(whole)))
    yield Reader("DataLoader, whole batches", partial(next, iter(batchwise)))
    items = itertools.cycle(range(len(whole)))
    yield Reader("memory map, one slice", lambda: sliced(shard, next(items) * b * context, b * context + 1))


def ours(
    shard: "Shard", b: int, context: int, seed: int | None, pin_for: "torch.device | None" = None
) -> "TrainBatches":
    """What training reads from, one micro-batch a step."""
    from blagpt_pl.data import ShardSet, TokenStream, TrainBatches

    return TrainBatches(TokenStream(ShardSet([shard], VOCABULARY), context, seed), b, b, 0, 1, pin_for=pin_for)


def moved(batches: "TrainBatches", source: "Iterator[torch.Tensor]", device: "torch.device") -> "torch.Tensor":
    """The next batch on the GPU, as `TokenData` moves it."""
    import torch

    batch = next(source)
    there = batch.to(device, non_blocking=True)
    batches.give_back(batch, torch.cuda.current_stream(device).record_event())
    return there


def sliced(shard: "Shard", first: int, n: int) -> "np.ndarray":
    """The limit: n tokens from one place as int32."""
    import numpy as np

    return mapped(shard).view(np.ndarray)[first : first + n].astype(np.int32)
