"""Ranks agree on a signal without waiting for one another: asked at one step, answered at the next."""

from types import SimpleNamespace

import pytest
import torch

from blagpt_pl.callbacks import stop
from blagpt_pl.callbacks.stop import GracefulStop


class Ranks:
    """An all-reduce among ranks that have called it equally often; `wait` fails if one has not."""

    def __init__(self, n: int) -> None:
        self.flags: list[list[torch.Tensor]] = [[] for _ in range(n)]
        self.now = 0

    def all_reduce(self, flag: torch.Tensor, op: object, group: object, async_op: bool) -> SimpleNamespace:
        assert async_op
        mine = self.flags[self.now]
        mine.append(flag)
        round_number = len(mine) - 1

        def wait() -> None:
            together = [flags[round_number] for flags in self.flags]
            flag.fill_(max(int(f) for f in together))

        return SimpleNamespace(wait=wait)


def test_all_ranks_act_at_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(3)
    monkeypatch.setattr(stop.dist, "all_reduce", ranks.all_reduce)
    callbacks = [GracefulStop() for _ in range(3)]
    for callback in callbacks:
        callback._group = object()
    strategy = SimpleNamespace(launcher=None)
    trainer = SimpleNamespace(checkpoint_callbacks=[], strategy=strategy, global_rank=0)
    left: dict[int, int] = {}
    for step in range(6):
        for rank, callback in enumerate(callbacks):
            if step == 2 and rank == 1:
                callback._received = 15  # before it asks
            ranks.now = rank
            try:
                callback.on_train_batch_start(trainer, None, None, step)
            except SystemExit as exit:
                left[rank] = step
                assert exit.code == 128 + 15
        if left:
            break
    assert left == {0: 3, 1: 3, 2: 3}


def test_one_rank_alone_acts_at_once() -> None:
    callback = GracefulStop()
    callback._received = 2
    trainer = SimpleNamespace(checkpoint_callbacks=[], strategy=SimpleNamespace(launcher=None), global_rank=0)
    with pytest.raises(SystemExit) as exit:
        callback.on_train_batch_start(trainer, None, None, 0)
    assert exit.value.code == 130


def test_what_was_asked_last_is_answered_before_the_group_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(1)
    monkeypatch.setattr(stop.dist, "all_reduce", ranks.all_reduce)
    callback = GracefulStop()
    callback._group = object()
    callback._ask()
    callback.on_train_end(None, None)
    assert callback._asked is None
