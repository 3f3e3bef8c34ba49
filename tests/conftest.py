"""What every test may ask for."""

import copy
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the fork server of the system tests imports it, too

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):  # `blagpt_pl` from this checkout, and `helpers`, however pytest was started
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line("markers", "xdist_group(name): tests of one name run in one process")
    config.addinivalue_line("markers", "slow: takes more than 10 s; runs only when asked for with `-m slow`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = "slow" in (config.getoption("markexpr") or "")
    for item in items:
        if item.path.is_relative_to(ROOT / "tests" / "system"):  # they share runs, and each keeps the cores busy
            item.add_marker(pytest.mark.xdist_group("system"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and not asked:
            item.add_marker(pytest.mark.skip(reason="slow; run with -m slow"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same randomness, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on many threads, and sums in one order are the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def _baseline() -> torch.nn.Module:
    from helpers import shake, tiny

    torch.manual_seed(0)
    return shake(tiny()).eval()


@pytest.fixture
def model(_baseline: torch.nn.Module) -> torch.nn.Module:
    """The tiny baseline in eval mode, its parameters moved off their start; a copy of its own for each test."""
    return copy.deepcopy(_baseline)


@pytest.fixture(scope="session")
def shards() -> Path:
    """The folder of real text, shards and tiktoken files beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "shards").is_dir():
        pytest.skip(f"no real data at {folder}")
    return folder
