"""One rank and two, DDP and FSDP2, started by Lightning and by torchrun: the same losses and the same weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import FSDP, scalars

SIXTEEN = ("--data.batch_size", "16")  # four micro-batches on one rank, two on each of two
DDP2 = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
FSDP2 = ("--trainer.devices", "2", "--trainer.strategy", json.dumps(FSDP))

PROBE = """
import lightning as L
import torch.distributed as dist

class Held(L.Callback):
    def on_train_start(self, trainer, model):
        held = sum(p.to_local().numel() for p in model.parameters())
        open(f"held-{trainer.global_rank}", "w").write(str(held))

class Reductions(L.Callback):
    def on_train_start(self, trainer, model):
        self.n = 0

        def hook(state, bucket):
            self.n += 1
            mean = bucket.buffer().div_(dist.get_world_size())
            return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])

        trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_end(self, trainer, model):
        open(f"reductions-{trainer.global_rank}", "w").write(str(self.n))
"""


@pytest.fixture(scope="module")
def runs(run: Callable, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank, on two with DDP (by Lightning), and on two with FSDP2 (by torchrun)."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, "fit", "--config", str(config), "--name", "one", *SIXTEEN)
    (folder / "probe.py").write_text(PROBE)
    counted = "--trainer.callbacks+=probe.Reductions"
    run(folder, "fit", "--config", str(config), "--name", "ddp", *SIXTEEN, *DDP2, counted)
    run(
        folder,
        "fit",
        "--config",
        str(config),
        "--name",
        "fsdp",
        *SIXTEEN,
        *FSDP2,
        "--trainer.callbacks+=probe.Held",
        torchrun=2,
    )
    return folder


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_alike(a: Path, b: Path, tolerance: float = 1e-6) -> None:
    """The same losses at the same steps, and the same weights, but for the order of sums."""
    first, second = scalars(a), scalars(b)
    for tag in ("train/loss", "val/loss", "val/bpb", "lr", "grad_norm"):
        assert [step for step, _ in first[tag]] == [step for step, _ in second[tag]], tag
        assert torch.allclose(
            *(torch.tensor([v for _, v in s[tag]]) for s in (first, second)), atol=tolerance, rtol=tolerance
        ), tag
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    assert max((mine[k] - theirs[k]).abs().max().item() for k in mine) <= tolerance


@pytest.mark.parametrize("other", ["ddp", "fsdp"])
def test_two_ranks_are_one(runs: Path, other: str) -> None:
    assert_alike(runs / "logs/one/0", runs / f"logs/{other}/0")


@pytest.mark.parametrize("name", ["one", "ddp", "fsdp"])
def test_the_ruler_counts_exactly_the_configured_tokens(runs: Path, name: str) -> None:
    assert {value for _, value in scalars(runs / f"logs/{name}/0")["val/tokens"]} == {1001.0}


def test_the_micro_batch_does_not_enter_the_ruler(runs: Path, run: Callable, config: Path) -> None:
    out, _ = run(runs, "validate", "--ckpt_path", "logs/one/0/checkpoints/last.ckpt", "--data.device_batch_size", "2")
    printed = dict(line.split() for line in out.splitlines() if line.startswith("val/"))
    result = json.loads((runs / "logs/one/0/result.json").read_text())
    assert printed["val/tokens"] == "1,001"
    assert float(printed["val/loss"]) == pytest.approx(result["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("source", "target", "flags", "torchrun"), [("ddp", "fsdp", FSDP2, 0), ("fsdp", "ddp", DDP2, 2)]
)
def test_a_checkpoint_of_one_goes_on_in_the_other(
    runs: Path, run: Callable, config: Path, source: str, target: str, flags: tuple, torchrun: int
) -> None:
    """And each strategy has been started by Lightning and by torchrun once, with what the runs above did."""
    longer = (*SIXTEEN, "--trainer.max_steps", "16", "--ckpt_path", f"logs/{source}/0/checkpoints/last.ckpt")
    run(runs, "fit", "--config", str(config), "--name", f"{source}-{target}", *longer, *flags, torchrun=torchrun)
    alone = runs / "logs" / f"{source}-one" / "0"
    run(runs, "fit", "--config", str(config), "--name", f"{source}-one", *longer)
    assert_alike(alone, runs / "logs" / f"{source}-{target}" / "0")


def test_gradients_are_exchanged_once_a_step(runs: Path) -> None:
    """Two micro-batches a rank, one bucket of gradients: as many reductions as steps."""
    assert [(runs / f"reductions-{rank}").read_text() for rank in (0, 1)] == ["12", "12"]


def test_sharding_shards(runs: Path) -> None:
    """Under FSDP2 each of two ranks holds about half of the parameters, while the checkpoint holds whole ones."""
    held = [int((runs / f"held-{rank}").read_text()) for rank in (0, 1)]
    whole = sum(v.numel() for k, v in weights(runs / "logs/fsdp/0").items() if k != "head.weight")  # tied
    assert sum(held) >= whole  # sharding pads
    assert max(held) < 0.6 * whole
    ours, theirs = (torch.load(runs / f"logs/{n}/0/checkpoints/last.ckpt", weights_only=True) for n in ("fsdp", "one"))
    shapes = [
        {i: tuple(s["exp_avg"].shape) for i, s in c["optimizer_states"][0]["state"].items()} for c in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
