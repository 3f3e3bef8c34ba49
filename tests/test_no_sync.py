"""No step waits for the device: operations that would are counted in a real run with this project's default flags.

On a CPU nothing waits, but the operations are the same ones: a scalar that is read, a size that depends on data. The test on
CUDA lets torch itself refuse them.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import block, tiny
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.lab import null_run
from blagpt_pl.models.blagpt import BlaGPT

STEPS, EVERY = 25, 10  # logged at 10, 20 and 25
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "unique_dim", "_unique2", "masked_select"}
METHODS = {"tolist", "numpy", "cpu", "__array__"}
HOST = 8  # scalars of the host that are read at a log point: by NonFinite (3) and by the bar (3), some twice at the end


class Watch(L.Callback):
    """Which step the run is in: from its start to the start of the next one."""

    def __init__(self) -> None:
        self.step, self.seen = 0, {"scalars": Counter(), "transfers": Counter()}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step + 1

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self.step = 0


class Operations(TorchDispatchMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.watch.seen["scalars"][self.watch.step] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            self.watch.seen["transfers"][self.watch.step] += 1
        return func(*args, **(kwargs or {}))


class Batches:
    """Two micro-batches a step."""

    def __init__(self, model: BlaGPT) -> None:
        tokens = torch.randint(model.vocab_size, (2, 3, 17), generator=torch.Generator().manual_seed(0))
        self.batch = (tokens[..., :-1], tokens[..., 1:])  # (A, B, T)
        if torch.cuda.is_available():
            self.batch = tuple(t.contiguous().pin_memory() for t in self.batch)

    def __iter__(self) -> Iterator[tuple]:
        while True:
            yield self.batch


class Peeking(BlaGPT):
    """Looks at its loss in each step."""

    def objective(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple:
        total, parts = super().objective(tokens, targets)
        assert parts["loss"].item() > 0
        return total, parts


def model(cls: type = BlaGPT) -> BlaGPT:
    adamw = partial(
        torch.optim.AdamW, lr=1e-3, fused=True
    )  # the baseline's; others read their own counter, on the host
    made = tiny(optimizer=adamw, block=block(dropout=0.1), dropout=0.1)
    made.__class__ = cls
    return made


def seen_in(module: BlaGPT, **flags: Any) -> dict[str, Counter]:
    """Reads and transfers by step."""
    watch = Watch()
    with null_run.silence() as folder:
        trainer = null_run.house_trainer(folder, STEPS, torch.device("cpu"), watch)
        for name, value in flags.items():
            setattr(trainer, name, value)
        with Operations(watch), Methods(watch):
            trainer.fit(module, Batches(module))
    assert trainer.global_step == STEPS
    return {kind: Counter({k: v for k, v in counts.items() if k}) for kind, counts in watch.seen.items()}


@pytest.mark.parametrize("clip", [None, 1.0])
def test_nothing_is_read_between_two_log_points(clip: float | None) -> None:
    seen = seen_in(model(), gradient_clip_val=clip)
    logged = {step for step in range(1, STEPS + 1) if step % EVERY == 0 or step == STEPS}
    assert set(seen["scalars"]) <= logged
    assert seen["transfers"] == Counter(dict.fromkeys(logged, 1)) + Counter({STEPS: 1})  # and the peaks at the end
    assert max(seen["scalars"].values(), default=0) <= HOST


def test_one_item_a_step_would_be_seen() -> None:
    seen = seen_in(model(Peeking))
    assert all(seen["scalars"][step] >= 2 for step in range(1, STEPS + 1))


class Strict(L.Callback):
    """Lets torch refuse what waits for the device, in every step that does not log."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        allowed = trainer.global_step < 2 or module.log_due(trainer.global_step + 1)  # the first ones allocate
        torch.cuda.set_sync_debug_mode("default" if allowed else "error")

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [None, "inductor"])
def test_torch_refuses_nothing_on_cuda(compiled: str | None) -> None:
    module = model()
    module.backend = compiled
    try:
        with null_run.silence() as folder:
            trainer = null_run.house_trainer(folder, 23, torch.device("cuda", 0), Strict())
            trainer.fit(module, Batches(module))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.global_step == 23


@pytest.mark.gpu
def test_torch_refuses_an_item_on_cuda() -> None:
    try:
        with null_run.silence() as folder, pytest.raises(RuntimeError, match="synchroniz"):
            trainer = null_run.house_trainer(folder, 23, torch.device("cuda", 0), Strict())
            trainer.fit(model(Peeking), Batches(model()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
