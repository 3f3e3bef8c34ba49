"""Step time is the time of optimizer steps: not of warm-up, validation or checkpoints."""

from types import SimpleNamespace

import pytest
import torch

from blagpt_pl.callbacks import step_time
from blagpt_pl.callbacks.progress import shown
from blagpt_pl.callbacks.step_time import StepTime
from blagpt_pl.callbacks.summary import summary


class Run:
    """A trainer, a module and a clock, as far as `StepTime` looks at them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, warmup: int = 2, log_every: int = 5) -> None:
        self.now = 100.0
        self.logged: list[dict] = []
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
        monkeypatch.setattr(step_time.time, "perf_counter", lambda: self.now)
        self.callback = StepTime(warmup)
        self.trainer = SimpleNamespace(max_steps=1000, global_step=0, world_size=2, optimizers=[self.optimizer])
        self.module = SimpleNamespace(device=torch.device("cpu"), report=self.report)
        self.module.tokens_per_step = 128
        self.module.log_due = lambda step: step % log_every == 0
        self.callback.on_train_start(self.trainer, self.module)

    def report(self, scalars: dict) -> None:
        if not self.logged or self.logged[-1].keys() & scalars.keys():
            self.logged.append({})
        self.logged[-1].update(scalars)

    def step(self, ms: float) -> None:
        self.now += ms / 1e3
        self.trainer.global_step += 1
        self.callback.on_train_batch_end(self.trainer, self.module, None, None, 0)


def test_warm_up_validation_and_checkpoints_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    for ms in (5000, 3000, 3000, 10, 12, 11):  # the first has no start, the next two are warm-up
        run.step(ms)
    run.now += 60  # a validation
    run.callback.on_validation_start(run.trainer, run.module)
    run.step(10)
    run.step(14)
    run.now += 60
    run.callback.on_save_checkpoint(run.trainer, run.module, {})
    run.step(10)
    run.step(13)
    assert run.callback.steps.ms == pytest.approx([10, 12, 11, 14, 13])
    result = run.callback.summary()
    assert result["step_ms"] == pytest.approx(12)
    assert result["step_ms_p90"] == pytest.approx(14)
    assert result["tokens_per_s"] == pytest.approx(128 / 0.012)


def test_a_log_covers_the_steps_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, warmup=0)
    for ms in (1, 10, 10, 10, 10, 20, 20, 20, 20, 20):
        run.step(ms)
    assert [log["perf/step_ms"] for log in run.logged] == pytest.approx([10, 20])
    assert run.logged[1]["perf/tokens_per_s"] == pytest.approx(128 / 0.02)
    assert "perf/mfu" not in run.logged[0]  # a CPU's peak is not known


def test_mfu_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, warmup=0, log_every=2)
    monkeypatch.setattr(step_time, "peak_flops", lambda device: 1e6)
    run.module.flops_per_token = lambda: 100
    run.step(1)
    run.step(10)
    assert run.logged[0]["perf/mfu"] == pytest.approx(128 / 0.01 * 100 / (1e6 * 2))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_optimizers_part_is_from_the_end_of_the_closure_to_the_end_of_its_step(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """With and without a closure, as a loss scaler calls it."""
    run = Run(monkeypatch, warmup=1, log_every=2)

    def update(ms: float) -> None:
        run.now += ms / 1e3

    run.optimizer.register_step_post_hook(lambda *_: None)
    monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *_: update(run.ms) or False)  # within the update

    def whole_step(ms: float) -> None:
        run.ms = ms
        if scaled:
            update(100)
            run.optimizer.step()
        else:
            run.optimizer.step(closure=lambda: update(100))
        run.step(1)

    for ms in (7, 7, 2, 4, 6, 3):  # the first has no start, the second is warm-up
        whole_step(ms)
    assert run.callback.updates.ms == pytest.approx([2, 4, 6, 3])
    assert [log.get("perf/optimizer_ms") for log in run.logged] == [pytest.approx(3), pytest.approx(4.5)]
    assert run.callback.summary()["optimizer_ms"] == pytest.approx(3.5)
    run.callback.on_train_end(run.trainer, run.module)
    whole_step(1)
    assert len(run.callback.updates.ms) == 4  # nothing is left on the optimizer


def test_a_run_too_short_to_time_says_nothing() -> None:
    assert StepTime().summary() == {}


def test_the_bar_and_the_summary_show_what_there_is() -> None:
    metrics = {"train/loss": torch.tensor(3.25), "perf/tokens_per_s": 12345.6, "lr": 0.1}
    assert shown(metrics) == {"loss": "3.2500", "tok/s": "12,346"}
    text = summary(
        {
            "state": "finished", "steps": 3, "max_steps": 3, "seconds": 4000, "tokens": 1000, "parameters": 1_500_000,
            "peak_ram_mib": 900.0, "hardware": "1 x CPU", "run": "logs/a/0",
        }
    )  # fmt: skip
    assert "finished: step 3 of 3 in 1 h 06 min" in text
    assert "1.50 M" in text
    assert "val loss" not in text
