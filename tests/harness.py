"""What the system tests share: a tiny configuration, processes of the `blagpt` command, and a reader of events."""

import multiprocessing.context
import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FSDP = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}


def tiny_config(folder: Path) -> dict:
    """A complete configuration: dropout, two micro-batches a step, an odd number of validation tokens."""
    norm = "RMSNorm"
    attention = {"n_heads": 4, "n_kv_heads": 2, "edits": ["RoPE"], "core": "SDPA"}
    block = {
        "norm": norm,
        "attention": {"class_path": "Attention", "init_args": attention},
        "mlp": {"class_path": "GatedMLP", "init_args": {"activation": "SiLU", "ratio": 2}},
        "dropout": 0.1,
    }
    model = {
        "vocab_size": 257, "d_model": 32, "n_layers": 2, "norm": norm, "head": "TiedHead", "dropout": 0.1,
        "init": {"class_path": "GPT2Init", "init_args": {"zero_outputs": True}},
        "block": {"class_path": "Block", "init_args": block},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
        "schedule": {"class_path": "Trapezoid", "init_args": {"warmup": 2, "warmdown": 4}},
    }  # fmt: skip
    files = {"train": [str(folder / "train_*.bin")], "val": [str(folder / "val_*.bin")], "tokenizer": "ByteTokenizer"}
    return {
        "name": "tiny",
        "model": {"class_path": "BlaGPT", "init_args": model},
        "data": {
            "source": {"class_path": "ShardFiles", "init_args": files},
            "context": 32, "batch_size": 8, "device_batch_size": 4, "val_tokens": 1001, "shuffle_seed": 0,
        },
        "trainer": {"max_steps": 12, "val_check_interval": 5, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
        "samples": {"max_new_tokens": 4},
    }  # fmt: skip


def child(cwd: str, words: list[str], environment: dict[str, str]) -> None:
    """The command, in a process that a fork server made: it has imported everything already."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{stream}-{os.getpid()}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = ["blagpt", *words]
    from blagpt_pl.cli import main

    main()


class Forked:
    """A `blagpt` process from the fork server, with the face of a Popen."""

    def __init__(
        self, context: multiprocessing.context.BaseContext, cwd: Path, words: tuple, env: dict[str, str]
    ) -> None:
        self.process = context.Process(target=child, args=(str(cwd), list(words), env))
        self.process.start()
        self.pid, self.cwd = self.process.pid, cwd

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired("blagpt", timeout)
        return tuple((self.cwd / f"{stream}-{self.pid}").read_text() for stream in ("out", "err"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of a run's event files: (step, value) by tag."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def texts(folder: Path) -> list[str]:
    """Tags of a run's texts."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return events.Tags()["tensors"]
