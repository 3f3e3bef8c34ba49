"""DeMo on two ranks: the loop over both, the same bits on both, gradients that stay at home, residuals in one checkpoint."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import FSDP, scalars
from helpers import V, shake, tiny
from naive_demo import demo_naive
from ranks import RANKS, Objective, full, joined
from ranks import run as run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from blagpt_pl.errors import ConfigError
from blagpt_pl.optim.demo import DeMo
from blagpt_pl.sharding import keep_gradients_local, shard

STEPS, ROWS, LENGTH = 3, 3, 12
VALUES = {"lr": 3e-3, "beta": 0.9, "topk": 5, "chunk": 8, "weight_decay": 0.1}


def fresh() -> nn.Module:
    torch.manual_seed(0)
    model = tiny(n_layers=1, optimizer=partial(DeMo, **{**VALUES, "weight_decay": 0.0}))
    return shake(model).double()


def rows(step: int, rank: int) -> Tensor:
    """(rows, length + 1) tokens of one rank."""
    return torch.randint(V, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(100 * step + rank))


def backward(objective: nn.Module, step: int, rank: int) -> None:
    objective.zero_grad()
    objective(rows(step, rank)[:, :-1], rows(step, rank)[:, 1:]).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list[Tensor]:
    """Steps under DDP; the first gradient of each."""
    wrapped, grads = DistributedDataParallel(Objective(model)), []
    keep_gradients_local(wrapped)
    for step in steps:
        backward(wrapped, step, rank)
        grads.append(next(model.parameters()).grad.clone())
        optimizer.step()
    return grads


def refusal(f: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as error:
        f()
    return str(error.value)


def work(rank: int, folder: Path) -> None:
    """One rank of two: train, save, go on, go on from what was saved, be refused."""
    with joined(rank, folder) as (mesh, results):
        model = fresh()
        optimizer = model.make_optimizer()
        results["grad"] = train(model, optimizer, rank, range(STEPS))[0]
        results["half"], results["sent"] = full(dict(model.named_parameters())), torch.tensor(optimizer.bytes_sent)
        results["residuals"] = [optimizer.state[p]["delta"].clone() for p in model.parameters()]
        saved = optimizer.state_dict()
        if rank == 0:
            torch.save(saved, folder / "state.pt")
        results["rows"] = [len(state["delta"]) for state in saved["state"].values()]
        train(model, optimizer, rank, range(STEPS, 2 * STEPS))
        results["all"] = full(dict(model.named_parameters()))

        again = fresh()
        again.load_state_dict(results["half"], strict=False)  # a tied head stands there once
        optimizer = again.make_optimizer()
        dist.barrier()
        optimizer.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        train(again, optimizer, rank, range(STEPS, 2 * STEPS))
        results["resumed"] = full(dict(again.named_parameters()))

        wrapped = DistributedDataParallel(Objective(again))
        keep_gradients_local(wrapped)
        sharded = fresh()
        results["refused"] = [
            refusal(lambda: keep_gradients_local(wrapped)),
            refusal(lambda: keep_gradients_local(DistributedDataParallel(Objective(again)), scaled=True)),
            refusal(lambda: keep_gradients_local(again)),
        ]
        shard(sharded, sharded.regions(), mesh)
        results["refused"].append(refusal(sharded.make_optimizer))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict]:
    """What each rank of two ended with."""
    return run_ranks(work, folder)


def naive(over_senders: bool = True) -> tuple[dict[str, Tensor], list[Tensor], list[list[Tensor]]]:
    """Weights of the naive twin after half of the steps, both ranks' first gradients, both ranks' residuals."""
    model = fresh()
    objective, params = Objective(model), list(model.parameters())
    deltas, first = [[torch.zeros_like(p) for p in params] for _ in range(RANKS)], []
    for step in range(STEPS):
        grads = []
        for rank in range(RANKS):
            backward(objective, step, rank)
            grads.append([p.grad.clone() for p in params])
        first = first or [own[0] for own in grads]
        with torch.no_grad():
            demo_naive(params, grads, deltas, over_senders=over_senders, **{**VALUES, "weight_decay": 0.0})
    return full(dict(model.named_parameters())), first, deltas


def largest(found: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((found[name] - p).abs().max()) for name, p in other.items())


def test_two_ranks_are_the_loop_over_both(results: list[dict]) -> None:
    weights, grads, residuals = naive()
    assert all(torch.equal(results[0]["half"][name], results[1]["half"][name]) for name in weights)
    assert largest(results[0]["half"], weights) < 1e-10
    for result, own in zip(results, residuals, strict=True):
        assert max(float((a - b).abs().max()) for a, b in zip(result["residuals"], own, strict=True)) < 1e-12
    assert (results[0]["residuals"][0] - results[1]["residuals"][0]).abs().max() > 1e-4
    for result, own in zip(results, grads, strict=True):  # the rank's own, neither summed nor divided
        assert (result["grad"] - own).abs().max() < 1e-12
    assert largest(weights, naive(over_senders=False)[0]) > VALUES["lr"]


def test_replicas_and_a_resumed_run_have_the_same_bits(results: list[dict]) -> None:
    for name, p in results[0]["all"].items():
        for result in results:
            assert torch.equal(result["all"][name], p), name
            assert torch.equal(result["resumed"][name], p), name
    assert largest(results[0]["all"], results[0]["half"]) > VALUES["lr"]


def test_bytes_are_those_of_values_and_short_indices(results: list[dict]) -> None:
    def tiles(p: Tensor) -> tuple[int, int]:
        sizes = [max(c for c in range(1, 9) if n % c == 0) for n in ((1, *p.shape) if p.ndim == 1 else p.shape)]
        return p.numel() // (sizes[0] * sizes[1]), min(5, sizes[0] * sizes[1])

    kept = sum(n * k for n, k in map(tiles, fresh().parameters()))
    assert [int(result["sent"]) for result in results] == [kept * (8 + 2)] * RANKS  # float64, int16


def test_rank_0_saves_a_row_of_each_rank_and_a_lone_rank_takes_the_mean(results: list[dict], folder: Path) -> None:
    assert [set(result["rows"]) for result in results] == [{RANKS}, {0}]
    saved = torch.load(folder / "state.pt", weights_only=True)
    model = fresh()
    optimizer = model.make_optimizer()
    with pytest.warns(UserWarning, match="another number of ranks"):
        optimizer.load_state_dict(saved)
    for i, p in enumerate(model.parameters()):
        ours = [state["delta"] for q, state in optimizer.state.items() if q is p]
        assert torch.allclose(ours[0], (results[0]["residuals"][i] + results[1]["residuals"][i]) / 2, atol=1e-15)


def test_what_cannot_be_is_refused(results: list[dict]) -> None:
    hooked, scaled, unwrapped, sharded = results[0]["refused"]
    assert "has a communication hook already" in hooked
    assert "fix: trainer.precision: bf16-mixed" in scaled
    assert "fix: trainer.strategy: ddp" in unwrapped
    assert sharded.startswith("model.optimizer: ") and "fix: trainer.strategy: ddp" in sharded


# ---------------------------------------------------------------------- the command

DDP2 = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
FSDP2 = ("--trainer.devices", "2", "--trainer.strategy", json.dumps(FSDP))
USED = (
    "--model.optimizer", json.dumps({"class_path": "DeMo", "init_args": {"lr": 5e-3, "chunk": 16, "topk": 8}}),
    "--trainer.gradient_clip_val", "0.5", "--trainer.max_steps", "8", "--checkpoint.every_n_steps", "4",
    "--trainer.callbacks+=probe.Probe", "--trainer.val_check_interval", "4", "--model.schedule", "Constant",
)  # fmt: skip
PROBE = """
import shutil
from pathlib import Path
import lightning as L
import torch

class Probe(L.Callback):
    def on_train_batch_start(self, trainer, model, batch, index):
        if trainer.global_step == 6 and trainer.is_global_zero and Path("keep").exists():
            shutil.copy(trainer.checkpoint_callbacks[0].last_path, "middle.ckpt")

    def on_before_optimizer_step(self, trainer, model, optimizer):
        self.norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()

    def on_train_end(self, trainer, model):
        name = f"{Path(trainer.log_dir).parent.name}-{trainer.global_rank}.pt"
        torch.save({"norm": self.norm, "weights": [p.detach().clone() for p in model.parameters()]}, name)
"""


def test_a_run_of_two_ranks_resumes_bit_by_bit(run: Callable, config: Path, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "keep").touch()
    run(tmp_path, "fit", "--config", str(config), "--name", "whole", *USED, *DDP2)
    (tmp_path / "keep").unlink()
    run(tmp_path, "fit", "--config", str(config), "--name", "second", *USED, *DDP2, "--ckpt_path", "middle.ckpt")
    found = {
        (name, rank): torch.load(tmp_path / f"{name}-{rank}.pt")
        for name in ("whole", "second")
        for rank in range(RANKS)
    }
    first = found["whole", 0]
    for one in found.values():
        assert all(torch.equal(a, b) for a, b in zip(one["weights"], first["weights"], strict=True))
    norms = [found["whole", rank]["norm"] for rank in range(RANKS)]
    logged = scalars(tmp_path / "logs/whole/0")
    assert norms[0] != norms[1] and logged["grad_norm"][-1][1] == pytest.approx(sum(norms) / 2, rel=1e-5)
    sent = {value for _, value in logged["perf/sent_mib"]}
    assert len(sent) == 1 and 0 < sent.pop() < sum(w.numel() for w in first["weights"]) * 4 / 2**20
    assert logged["train/loss"][-1][1] < logged["train/loss"][0][1] - 0.1, logged["train/loss"]
    states = [
        torch.load(tmp_path / f"logs/{name}/0/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        for name in ("whole", "second")
    ]
    for key, state in states[0].items():
        assert len(state["delta"]) == RANKS and torch.equal(state["delta"], states[1][key]["delta"])
