"""Whole runs of the `blagpt` command, in processes of their own, on a model and data so small that start-up is the cost."""

import multiprocessing
import multiprocessing.context
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from harness import Forked, tiny_config

from blagpt_pl.data.shards import write_shard


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of a tiny run over bytes with some structure."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.integers(-2, 3, 12000)) % 256
    write_shard(folder / "train_0.bin", walk[:10000], 257)
    write_shard(folder / "val_0.bin", walk[10000:], 257)
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(folder)))
    return file


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One thread a process, and no trace of a launcher around the tests."""
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
    return {**{k: v for k, v in os.environ.items() if k not in unwanted}, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def forks() -> multiprocessing.context.BaseContext:
    """A server that imports Lightning once and forks a process for each run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["blagpt_pl.lab.train"])
    return context


@pytest.fixture(scope="session")
def blagpt(
    environment: dict[str, str], forks: multiprocessing.context.BaseContext
) -> Callable[..., Forked | subprocess.Popen]:
    """Start `blagpt WORDS...` in a folder.

    On several devices Lightning starts the other ranks with the same command, so that one needs a process of its own;
    `torchrun=2` starts it under torchrun.
    """

    def start(cwd: Path, *words: str, torchrun: int = 0) -> Forked | subprocess.Popen:
        if not torchrun and "--trainer.devices" not in words:
            return Forked(forks, cwd, words, environment)
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torchrun)] if torchrun else []
        )
        command = [sys.executable, *launcher, "-m", "blagpt_pl.cli", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )

    return start


@pytest.fixture(scope="session")
def run(blagpt: Callable[..., Forked | subprocess.Popen]) -> Callable[..., tuple[str, str]]:
    """Run `blagpt` to its end and return what it printed; fail unless it exits as expected."""

    def finish(cwd: Path, *words: str, torchrun: int = 0, code: int = 0) -> tuple[str, str]:
        process = blagpt(cwd, *words, torchrun=torchrun)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
        return out, err

    return finish
