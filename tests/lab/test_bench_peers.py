"""`blagpt bench peers`: like is compared with like, the Trainer really trains, who is not there is a note."""

import argparse
import statistics
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from blagpt_pl.lab import bench_peers, peers, stepper
from blagpt_pl.nn.base import count

CPU = torch.device("cpu")
TINY = peers.Shape(d_model=32, n_layers=2, n_heads=4, gated=86, vocab_size=64, context=16, batch=2)


@pytest.fixture(autouse=True)
def at_a_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.SHAPES, "small", TINY)
    monkeypatch.setitem(bench_peers.STEPS, "small", 2)


def measured(options: str = "") -> object:
    p = argparse.ArgumentParser()
    bench_peers.options(p)
    args = p.parse_args(options.split())
    args.size, args.repeats, args.warmup = "small", 3, 0
    return bench_peers.measure(args, CPU)


def broken(*_: object) -> None:
    raise RuntimeError("no such kernel")


def test_rows_ratios_and_who_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = peers.Peer("Absent", "llama", peers.hf_llama, "no_such_package_here", "pip install it")
    fails = peers.Peer("Fails", "llama", broken, "torch")
    ours = [peer for peer in peers.PEERS if peer.package is None]
    monkeypatch.setattr(peers, "PEERS", (*ours, absent, fails))
    report = measured()
    names = [(row["name"], row["style"]) for row in report.rows]
    assert names == [
        (peers.OURS, "llama"), (bench_peers.TRAINER, "llama"), (peers.OURS, "gpt2"), ("Absent", "llama"), ("Fails", "llama"),
    ]  # fmt: skip
    plain, trainer, gpt2, *without = report.rows
    assert (plain["ratio"], gpt2["ratio"]) == (1, 1)
    assert trainer["ratio"] == statistics.median(trainer["times_ms"]) / statistics.median(plain["times_ms"])
    assert trainer["peak_mib"] is None
    assert all(len(row["times_ms"]) == 3 for row in (plain, trainer, gpt2))
    assert all("median_ms" not in row for row in without)
    assert report.notes[0] == "Absent: not installed; fix: pip install it"
    assert report.notes[1] == "Fails: does not train here (RuntimeError: no such kernel)"
    assert "| Absent " in report.table()


def test_a_mistake_of_ours_is_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PEERS", (peers.Peer(peers.OURS, "llama", broken),))
    with pytest.raises(RuntimeError, match="no such kernel"):
        measured()


def test_the_trainer_takes_the_steps_that_are_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (taken.append(1), step(*a, **k))[1])
    clock = peers.through_trainer(TINY, CPU, None, "32-true", 3)
    assert (clock.steps, len(taken)) == (4, 4)
    assert clock.ms_per_step > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_hugging_faces_model_is_of_the_same_size_and_loses_the_same_targets(style: str) -> None:
    pytest.importorskip("transformers")
    theirs, loss = (peers.hf_llama if style == "llama" else peers.hf_gpt2)(TINY, CPU, None)
    ours, _ = peers.ours(style)(TINY, CPU, None)
    assert count(theirs.parameters()) == count(ours.parameters())
    tokens, targets = stepper.random_batch(TINY.vocab_size, TINY.batch, TINY.context, CPU)
    logits = theirs(input_ids=tokens).logits
    torch.testing.assert_close(loss(tokens, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("peer", [p for p in peers.PEERS if p.package is not None], ids=lambda p: p.name)
def test_a_peer_trains(peer: peers.Peer) -> None:
    if peer.missing():
        pytest.skip(peer.missing())
    torch.manual_seed(0)
    module, loss = peer.build(TINY, CPU, None)
    batch = stepper.random_batch(TINY.vocab_size, TINY.batch, TINY.context, CPU)
    ours, _ = peers.ours(peer.style)(TINY, CPU, None)
    assert abs(count(module.parameters()) / count(ours.parameters()) - 1) < 0.02
    before = loss(*batch)
    before.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert abs(before.item() - torch.log(torch.tensor(64.0)).item()) < 1.5
