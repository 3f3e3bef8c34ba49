"""A progress bar in optimizer steps: loss, tokens a second, time left. Lines instead of a bar where output is a file."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


def shown(metrics: dict[str, Any]) -> dict[str, str]:
    """The few numbers worth a place on the bar."""
    result = {}
    for name, key, form in (
        ("loss", "train/loss", ".4f"),
        ("val", "val/loss", ".4f"),
        ("tok/s", "perf/tokens_per_s", ",.0f"),
    ):
        if key in metrics:
            result[name] = format(float(metrics[key]), form)
    return result


class Progress(ProgressBar):
    """One bar for the run, and one for each validation while it lasts.

    Args:
        lines_every_s: where output is not a terminal, seconds between two lines.
    """

    def __init__(self, lines_every_s: float = 10.0) -> None:
        super().__init__()
        self.lines_every_s = lines_every_s
        self._enabled = True
        self._bar: tqdm | None = None
        self._eval_bar: tqdm | None = None
        self._line_due = 0.0
        self._start = (0.0, 0)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    @property
    def _visible(self) -> bool:
        return self._enabled and self.trainer.is_global_zero

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._visible:
            tqdm.write(" ".join(str(a) for a in args), file=sys.stderr)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = (time.monotonic(), trainer.global_step)
        self._line_due = time.monotonic() + self.lines_every_s
        if self._visible and sys.stderr.isatty():
            form = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(
                total=trainer.max_steps, initial=trainer.global_step, desc="step", bar_format=form, dynamic_ncols=True
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step and pl_module.log_due(step) and self._visible:
            self._show(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def _show(self, trainer: L.Trainer) -> None:
        numbers = shown(trainer.callback_metrics)
        if self._bar is not None:
            self._bar.set_postfix(numbers, refresh=False)
        elif time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + self.lines_every_s
            done = trainer.global_step - self._start[1]
            left = (time.monotonic() - self._start[0]) / max(1, done) * (trainer.max_steps - trainer.global_step)
            text = "  ".join(f"{k} {v}" for k, v in numbers.items())
            print(
                f"step {trainer.global_step}/{trainer.max_steps}  {text}  left {tqdm.format_interval(left)}",
                file=sys.stderr,
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._eval_start("validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._eval_step("validation", batch_idx + 1, sum(trainer.num_val_batches))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_eval()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._eval_start("test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._eval_step("test", batch_idx + 1, sum(trainer.num_test_batches))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close_eval()

    def _eval_start(self, name: str, total: int) -> None:
        self._line_due = max(self._line_due, time.monotonic() + self.lines_every_s)
        if self._visible and sys.stderr.isatty():
            self._eval_bar = tqdm(total=total, desc=name, leave=False, position=1, dynamic_ncols=True)

    def _eval_step(self, name: str, done: int, total: int) -> None:
        if self._eval_bar is not None:
            self._eval_bar.update(1)
        elif self._visible and time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + self.lines_every_s
            print(f"{name} {done}/{total}", file=sys.stderr)

    def _close_eval(self) -> None:
        if self._eval_bar is not None:
            self._eval_bar.close()
            self._eval_bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._bar is not None:
            self._bar.set_postfix(shown(trainer.callback_metrics), refresh=False)
        self._close_bar()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close_eval()
        self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
