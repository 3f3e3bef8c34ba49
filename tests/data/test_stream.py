"""The stream: each target once an epoch over any history of ranks and resumes, and evaluation of exactly n tokens."""

import re
import tempfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blagpt_pl.data import (
    EvalBatches,
    ShardSet,
    TokenStream,
    TrainBatches,
    check_batch,
    rank_samples,
    split,
    write_shard,
)
from blagpt_pl.errors import ConfigError, DataError


def counting(n_tokens: int, files: int = 1) -> ShardSet:
    """Shards whose token at position p is p, so that a batch says what it read."""
    edges = np.linspace(0, n_tokens, files + 1).astype(int)
    parts = [np.arange(a, b) for a, b in pairwise(edges) if b > a]
    with tempfile.TemporaryDirectory() as folder:
        shards = ShardSet([write_shard(f"{folder}/{i}.bin", part, 2**20) for i, part in enumerate(parts)], 2**20)
        shards.digests()  # opens every file, so that the folder can go
    return shards


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 9))
def test_an_epoch_is_a_permutation(n_windows: int, seed: int, epoch: int) -> None:
    stream = TokenStream(SimpleNamespace(n_tokens=n_windows + 1), 1, seed)
    windows = stream.windows(np.arange(epoch * n_windows, (epoch + 1) * n_windows))
    assert sorted(windows.tolist()) == list(range(n_windows))
    again = stream.windows(np.arange(epoch * n_windows, (epoch + 1) * n_windows))
    assert windows.tolist() == again.tolist()


def test_seed_and_epoch_change_the_order_and_null_keeps_it() -> None:
    shards = counting(1001, files=3)
    orders = {
        (seed, epoch): tuple(TokenStream(shards, 10, seed).windows(np.arange(100) + 100 * epoch))
        for seed in (None, 0, 1)
        for epoch in (0, 1)
    }
    assert orders[None, 0] == orders[None, 1] == tuple(range(100))
    assert len(set(orders.values())) == 5
    across = TokenStream(shards, 10, 1).windows(np.arange(90, 110))  # one read over an epoch edge
    assert tuple(across) == orders[1, 0][90:] + orders[1, 1][:10]


def test_windows_overlap_by_the_shifted_token() -> None:
    stream = TokenStream(counting(101, files=4), 10, None)
    assert stream.n_windows == 10
    rows = stream.read(np.arange(12))
    assert rows.dtype == np.int32
    assert rows[3].tolist() == list(range(30, 41))
    assert rows[10].tolist() == rows[0].tolist()  # the second epoch


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_each_target_once_an_epoch_over_any_history(data: st.DataObject) -> None:
    """Worlds, micro-batch sizes and resumes change at random; every epoch still holds every target exactly once."""
    context = data.draw(st.integers(1, 4))
    per_step = data.draw(st.sampled_from([4, 6, 12, 24]))
    n_tokens = 1 + context * per_step * data.draw(st.integers(1, 4)) + data.draw(st.integers(0, context - 1))
    stream = TokenStream(counting(n_tokens, files=3), context, data.draw(st.none() | st.integers(0, 99)))
    steps_an_epoch = stream.n_windows // per_step
    seen: Counter[tuple[int, int]] = Counter()  # (epoch, target)
    step, end = 0, 2 * steps_an_epoch
    while step < end:
        world = data.draw(st.sampled_from([w for w in (1, 2, 3, 4, 6) if per_step % w == 0]))
        fits = [b for b in range(1, per_step + 1) if per_step % (b * world) == 0]
        device_batch_size = data.draw(st.sampled_from(fits))
        steps = data.draw(st.integers(1, end - step))
        for rank in range(world):
            batches = TrainBatches(stream, per_step, device_batch_size, rank, world, start_step=step)
            for at, batch in enumerate(islice(batches, steps), step):
                assert batch.shape == (per_step // (device_batch_size * world), device_batch_size, context + 1)
                seen.update((at // steps_an_epoch, target) for target in batch[..., 1:].flatten().tolist())
        step += steps
    assert seen == Counter((epoch, target) for epoch in (0, 1) for target in range(1, stream.n_windows * context + 1))


def test_one_rank_with_two_micro_batches_sees_what_two_ranks_see() -> None:
    stream = TokenStream(counting(2001), 10, 7)
    alone = list(islice(TrainBatches(stream, 8, 4, 0, 1), 5))
    pair = [list(islice(TrainBatches(stream, 8, 4, rank, 2), 5)) for rank in (0, 1)]
    for step in range(5):
        assert alone[step].shape == (2, 4, 11) and pair[0][step].shape == (1, 4, 11)
        assert torch.equal(alone[step], torch.cat([pair[0][step], pair[1][step]]))
    assert torch.equal(alone[3], next(iter(TrainBatches(stream, 8, 4, 0, 1, start_step=3))))
    assert rank_samples(2, 1, 2, 8, 2).tolist() == [[18, 19], [22, 23]]


def test_the_start_is_read_when_iteration_starts() -> None:
    position = 0
    batches = TrainBatches(TokenStream(counting(1001), 10, None), 2, 2, 0, 1, start_step=lambda: position)
    assert next(iter(batches))[0, 0, 0] == 0
    position = 4
    assert next(iter(batches))[0, 0, 0] == 80
    with pytest.raises(TypeError):
        len(batches)


def test_a_bad_token_reaches_the_caller_out_of_the_reading_thread(tmp_path: Path) -> None:
    shards = ShardSet([write_shard(tmp_path / "s.bin", [*range(50), 99, *range(50)], 100)], 99)
    batches = iter(TrainBatches(TokenStream(shards, 10, None), 1, 1, 0, 1))
    assert len(list(islice(batches, 4))) == 4
    with pytest.raises(DataError, match=r"s\.bin: token id 99 at index 50"):
        next(batches)


@settings(max_examples=200, deadline=None)
@given(
    n_tokens=st.integers(1, 200),
    context=st.integers(1, 12),
    batch_size=st.integers(1, 7),
    world=st.integers(1, 8),
    first=st.integers(0, 5),
)
def test_evaluation_covers_exactly_n_targets(
    n_tokens: int, context: int, batch_size: int, world: int, first: int
) -> None:
    shards = counting(first + n_tokens + 1, files=2)
    lengths = np.arange(2**10) % 5
    targets, total_bytes, counts = [], 0, set()
    for rank in range(world):
        loader = EvalBatches(shards, first, n_tokens, context, batch_size, rank, world, lengths)
        batches = list(loader)
        counts.add(len(batches))
        assert len(batches) == len(loader)
        for batch in batches:
            assert batch.tokens.shape == (batch_size, context + 1) and batch.tokens.dtype == torch.int32
            inputs, wanted = split(batch.tokens)
            valid = wanted != -100
            assert torch.equal(inputs[valid] + 1, wanted[valid])
            targets += wanted[valid].tolist()
            assert batch.n_bytes.shape == () and batch.n_bytes.dtype == torch.int64
            total_bytes += int(batch.n_bytes)
    assert sorted(targets) == list(range(first + 1, first + n_tokens + 1))
    assert len(counts) == 1
    assert total_bytes == int(lengths[targets].sum())


def test_unknown_byte_lengths_are_minus_one() -> None:
    (batch,) = EvalBatches(counting(11), 0, 10, 10, 2, 0, 1)
    assert batch.n_bytes == -1 and batch.tokens[1].tolist() == [-1] * 11


def test_split_shifts_once_and_hides_padding() -> None:
    tokens = torch.tensor([[[5, 6, 7, -1, -1], [-1] * 5]], dtype=torch.int32)
    inputs, targets = split(tokens)
    assert inputs.tolist() == [[[5, 6, 7, 0], [0] * 4]]
    assert targets.tolist() == [[[6, 7, -100, -100], [-100] * 4]]
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(1, 40), st.integers(1, 8))
def test_an_indivisible_batch_names_sizes_that_work(batch_size: int, device_batch_size: int, world: int) -> None:
    if batch_size % (device_batch_size * world) == 0:
        assert check_batch(batch_size, device_batch_size, world) * device_batch_size * world == batch_size
        return
    with pytest.raises(ConfigError) as error:
        check_batch(batch_size, device_batch_size, world)
    message = str(error.value)
    assert message.startswith(f"data.batch_size: {batch_size} ")
    lists = [[int(n) for n in found.split(",")] for found in re.findall(r"\[([\d, ]+)\]", message)]
    for size in lists[0]:
        check_batch(size, device_batch_size, world)
    for device in lists[1] if len(lists) > 1 else []:
        check_batch(batch_size, device, world)
