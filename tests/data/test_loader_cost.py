"""What a batch costs, in counts: system calls, allocations; and that memory used again is never used too early."""

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blagpt_pl.data import (
    ByteTokenizer,
    EvalBatches,
    ShardFiles,
    ShardSet,
    TokenData,
    TokenStream,
    TrainBatches,
    write_shard,
)
from blagpt_pl.data.buffers import HostBuffers, pageable, pinned
from blagpt_pl.errors import DataError


def shard_set(parts: list[np.ndarray], sizes: list[int], vocab_size: int | None = None) -> ShardSet:
    """A file for each part, with tokens of 2 or 4 bytes; all are open, so that their folder can go."""
    with tempfile.TemporaryDirectory() as folder:
        files = zip(parts, sizes, strict=True)
        shards = [write_shard(f"{folder}/{i}.bin", p, 2**16 if size == 4 else 500) for i, (p, size) in enumerate(files)]
        opened = ShardSet(shards, vocab_size)
        opened.digests()
    return opened


def counting(n_tokens: int, files: int = 1) -> ShardSet:
    """Token p stands at position p, over files of about equal length."""
    edges = np.linspace(0, n_tokens, files + 1).astype(int)
    return shard_set([np.arange(a, b) for a, b in pairwise(edges)], [4] * files)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every `os.preadv` from here on."""
    sizes, preadv = [], os.preadv

    def counted(descriptor: int, buffers: tuple[memoryview, ...], offset: int) -> int:
        sizes.append(preadv(descriptor, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_windows_in_any_order_are_those_of_a_naive_reader(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    sizes = data.draw(st.lists(st.sampled_from([2, 4]), min_size=len(lengths), max_size=len(lengths)))
    whole = np.random.default_rng(sum(lengths)).integers(0, 500, sum(lengths))
    shards = shard_set(np.split(whole, np.cumsum(lengths)[:-1]), sizes, vocab_size=500)
    length = data.draw(st.integers(0, len(whole)))
    start = st.integers(0, len(whole) - length)
    starts = data.draw(st.lists(start, max_size=8))
    if starts and data.draw(st.booleans()):  # runs, one of which begins where another may end
        run = range(data.draw(start), len(whole) - length + 1, max(length - 1, 1))
        at = data.draw(st.integers(0, len(starts)))
        starts = [*starts[:at], *run, *starts[at:]]
    out = np.full((len(starts), length), -7, data.draw(st.sampled_from([np.int32, np.int64])))
    shards.read_windows(np.array(starts, np.int64), out)
    assert out.tolist() == [whole[a : a + length].tolist() for a in starts]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_first_bad_token_is_named_wherever_it_is_read(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    whole = np.zeros(sum(lengths), int)
    bad = data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1, max_size=4))
    whole[[*bad]] = 400
    shards = shard_set(np.split(whole, np.cumsum(lengths)[:-1]), [2] * len(lengths), vocab_size=300)
    length = data.draw(st.integers(1, len(whole)))
    starts = data.draw(st.lists(st.integers(0, len(whole) - length), min_size=1, max_size=6))
    out = np.empty((len(starts), length), np.int32)
    met = [p for a in starts for p in range(a, a + length) if p in bad]
    if not met:
        shards.read_windows(np.array(starts), out)
        assert not out.any()
        return
    file = int(np.searchsorted(np.cumsum(lengths), met[0], "right"))
    index = met[0] - sum(lengths[:file])
    with pytest.raises(DataError, match=rf"/{file}\.bin: token id 400 at index {index} \(expected < 300"):
        shards.read_windows(np.array(starts), out)


def test_an_order_is_still_the_one_of_earlier_versions() -> None:
    """A run that is resumed reads on in the order it began with."""
    for seed, epoch in ((0, 0), (3, 1)):
        stream = TokenStream(SimpleNamespace(n_tokens=1001), 1, seed)
        expected = np.random.default_rng([seed, epoch]).permutation(np.arange(1000, dtype=np.int32))
        assert np.array_equal(stream.order(epoch), expected)


@pytest.mark.parametrize("files", [1, 2, 5])
def test_in_file_order_a_batch_is_one_read_a_file(files: int, reads: list[int]) -> None:
    batches = TrainBatches(TokenStream(counting(64 * 16 + 1, files), 16, None), 64, 64, 0, 1)
    reads.clear()
    assert np.array_equal(batches.batch(0)[0, :, 0], 16 * np.arange(64))
    assert len(reads) == files
    assert sum(reads) == 4 * (64 * 16 + 1)  # every token once
    accumulated = TrainBatches(batches.stream, 64, 8, 0, 1)
    reads.clear()
    assert torch.equal(accumulated.batch(0).view(64, 17), batches.batch(0)[0])  # micro-batches of one rank: one run
    assert len(reads) == 2 * files


def test_other_ranks_and_the_end_of_an_epoch_cut_runs(reads: list[int]) -> None:
    stream = TokenStream(counting(40 * 16 + 1), 16, None)
    reads.clear()
    TrainBatches(stream, 32, 4, 1, 2).batch(0)
    assert len(reads) == 4  # micro-batches of 4 windows, with the other rank's between them
    reads.clear()
    TrainBatches(stream, 32, 32, 0, 1).batch(1)  # windows 32 to 39, and 0 to 23 again
    assert len(reads) == 2


@pytest.mark.parametrize("files", [1, 3])
def test_shuffled_a_batch_is_at_most_one_read_a_window(files: int, reads: list[int]) -> None:
    shards = counting(1000 * 16 + 1, files)
    batches = TrainBatches(TokenStream(shards, 16, 0), 64, 64, 0, 1)
    for step in range(20):
        reads.clear()
        batches.batch(step)
        assert 32 < len(reads) <= 64 + files - 1


def test_an_evaluation_batch_is_one_read_and_one_for_a_partial_window(reads: list[int]) -> None:
    shards = counting(200)
    reads.clear()
    assert len(list(EvalBatches(shards, 3, 4 * 10 * 4 + 5, 10, 4, 0, 1))) == 5
    assert len(reads) == 5  # four of four windows, one of half a window


def test_a_short_read_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, preadv = counting(500), os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:37]], offset))
    out = np.empty(400, np.int32)
    shards.read(50, out)
    assert out.tolist() == list(range(50, 450))


class Device:
    """A device that copies as late as it may: at the next-but-`lag` copy, or when an event is waited for."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.lock = threading.RLock()  # the reading thread waits for events while copies are asked for
        self.waiting: deque[tuple[Tensor, Tensor]] = deque()
        self.done = 0
        self.waits = 0

    def copy(self, source: Tensor) -> tuple[Tensor, "Copied"]:
        target = torch.full_like(source, -1)
        with self.lock:
            self.waiting.append((source, target))
            number = self.done + len(self.waiting)
            self.run(number - self.lag)
        return target, Copied(self, number)

    def run(self, number: int) -> None:
        """Until that many copies are over."""
        with self.lock:
            while self.done < number:
                source, target = self.waiting.popleft()
                target.copy_(source)
                self.done += 1

    def finish(self) -> None:
        with self.lock:
            self.run(self.done + len(self.waiting))


class Copied:
    """The event behind a copy."""

    def __init__(self, device: Device, number: int) -> None:
        self.device, self.number = device, number

    def query(self) -> bool:
        return self.device.done >= self.number

    def synchronize(self) -> None:
        with self.device.lock:
            self.device.waits += not self.query()
            self.device.run(self.number)


class Lies(Copied):
    """An event that is over before the copy is."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


def pool(calls: list[Tensor]) -> Callable[[tuple[int, ...]], Tensor]:
    """An allocator that remembers what it gave."""

    def allocate(shape: tuple[int, ...]) -> Tensor:
        calls.append(pageable(shape))
        return calls[-1]

    return allocate


def trained_on(batches: TrainBatches, device: Device, steps: int, event: type = Copied, held: int = 1) -> list[Tensor]:
    """What arrives on a device, if `held` batches are fetched ahead of the one that is moved, as Lightning does."""
    arrived, fetched, source = [], deque(), iter(batches)
    for _ in range(steps):
        while len(fetched) <= held:
            fetched.append(next(source))
        batch = fetched.popleft()
        moved, copied = device.copy(batch)
        batches.give_back(batch, event(device, copied.number))
        arrived.append(moved)
    source.close()  # the reading thread has ended
    device.finish()
    return arrived


@pytest.mark.parametrize("held", [0, 1, 3])
@pytest.mark.parametrize("lag", [0, 1, 2, 7])
def test_buffers_are_used_again_and_never_too_early(lag: int, held: int) -> None:
    calls, device = [], Device(lag)
    batches = TrainBatches(TokenStream(counting(16 * 300 + 1, 3), 16, 5), 4, 2, 0, 1, allocate=pool(calls))
    arrived = trained_on(batches, device, 50, held=held)
    assert len(calls) <= 2 + 3 + held + 1  # in flight, ready or being read, held, being moved
    for step, batch in enumerate(arrived):
        assert torch.equal(batch, batches.batch(step)), step
    assert lag >= 2 or device.waits == 0  # nobody waits for a device that keeps up


def test_that_test_sees_a_buffer_that_is_used_too_early() -> None:
    batches = TrainBatches(TokenStream(counting(16 * 300 + 1, 3), 16, 5), 4, 2, 0, 1, allocate=pool([]))
    arrived = trained_on(batches, Device(7), 50, Lies)
    assert not all(torch.equal(batch, batches.batch(step)) for step, batch in enumerate(arrived))


def test_what_is_not_given_back_is_never_overwritten() -> None:
    calls = []
    batches = TrainBatches(TokenStream(counting(16 * 300 + 1), 16, None), 4, 2, 0, 1, allocate=pool(calls))
    kept = list(islice(batches, 30))
    assert len({batch.data_ptr() for batch in kept}) == 30
    assert all(torch.equal(batch, batches.batch(step)) for step, batch in enumerate(kept))


def test_only_what_was_taken_comes_back_and_only_once() -> None:
    calls, over = [], SimpleNamespace(query=lambda: True, synchronize=lambda: None)
    buffers = HostBuffers(pool(calls), (2, 3))
    first = buffers.take()
    for foreign in (torch.zeros(2, 3, dtype=torch.int32), first.view(3, 2), first.clone()):
        buffers.give_back(foreign, over)
    second = buffers.take()
    buffers.give_back(first, over)
    buffers.give_back(first, over)
    third, fourth = buffers.take(), buffers.take()
    assert third is first and len(calls) == 3
    assert len({t.data_ptr() for t in (second, third, fourth)}) == 3


class Mover(L.LightningModule):
    """Keeps every batch as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.inputs: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.inputs.append(batch[0])
        self.optimizers().step()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def token_data(folder: Path) -> TokenData:
    write_shard(f"{folder}/t.bin", np.arange(2001) % 251, 257)
    write_shard(f"{folder}/v.bin", range(90), 257)
    source = ShardFiles([f"{folder}/t.bin"], [f"{folder}/v.bin"], ByteTokenizer())
    return TokenData(source, context=10, batch_size=4, device_batch_size=2, val_tokens=45)


def fitted(data: TokenData, folder: Path, accelerator: str, steps: int) -> Mover:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    model = Mover()
    trainer = L.Trainer(
        max_epochs=-1, max_steps=steps, accelerator=accelerator, devices=1, default_root_dir=folder,
        limit_val_batches=0, use_distributed_sampler=False, **quiet,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model


def test_moving_a_batch_to_a_gpu_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on the CPU that is told it is on a GPU: the copy is late, and behind it comes an event."""
    data, device, calls, events = token_data(tmp_path), Device(5), [], []
    cuda = torch.device("cuda", 0)

    def copy(self: object, batch: Tensor, to: torch.device, dataloader_idx: int) -> Tensor:
        moved, copied = device.copy(batch)
        events.append(copied)
        return moved

    monkeypatch.setattr(L.LightningDataModule, "transfer_batch_to_device", copy)
    stream = SimpleNamespace(record_event=lambda: events[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda at: stream if at == cuda else None)
    data._train_batches = TrainBatches(TokenStream(counting(2001), 10, None), 4, 2, 0, 1, allocate=pool(calls))
    source = iter(data._train_batches)
    moved = [data.transfer_batch_to_device(next(source), cuda, 0) for _ in range(50)]
    source.close()
    device.finish()
    assert len(calls) <= 6
    assert all(torch.equal(batch, data._train_batches.batch(step)) for step, batch in enumerate(moved))


def test_on_a_cpu_nothing_is_overwritten(tmp_path: Path) -> None:
    """Lightning moves nothing there: what a model sees is a view of, or a cast from, what was read."""
    data = token_data(tmp_path)
    inputs = fitted(data, tmp_path, "cpu", 20).inputs
    assert [int(batch[0, 0, 0]) for batch in inputs] == [40 * step % 251 for step in range(20)]
    assert not data._train_batches.buffers._back


@pytest.mark.gpu
def test_on_a_gpu_pinned_buffers_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(shape: tuple[int, ...]) -> Tensor:
        calls.append(pinned(shape))
        return calls[-1]

    monkeypatch.setattr("blagpt_pl.data.stream.pinned", counted)
    inputs = fitted(token_data(tmp_path), tmp_path, "cuda", 50).inputs
    assert [int(batch[0, 0, 0]) for batch in inputs] == [40 * step % 251 for step in range(50)]
    assert 3 <= len(calls) <= 7 and all(tensor.is_pinned() for tensor in calls)


@pytest.mark.gpu
def test_a_gpu_that_lags_gets_what_was_read() -> None:
    """Each copy waits on the device behind 5 ms of other work, so that the host is far ahead of it."""
    cuda = torch.device("cuda", torch.cuda.current_device())
    batches = TrainBatches(TokenStream(counting(1024 * 300 + 1), 1024, 5), 8, 8, 0, 1, pin_for=cuda)
    moved, source = [], iter(batches)
    for _ in range(20):
        batch = next(source)
        assert batch.is_pinned()
        torch.cuda._sleep(10_000_000)
        moved.append(batch.to(cuda, non_blocking=True))
        batches.give_back(batch, torch.cuda.current_stream(cuda).record_event())
        del batch
    source.close()
    assert all(torch.equal(batch.cpu(), batches.batch(step)) for step, batch in enumerate(moved))
