"""A step of the training epoch, without asking again what a run cannot change.

Between two steps Lightning's loop asks who moves a batch, whether gradients accumulate, whether the optimization is manual, the
optimizers several, the schedulers of a kind that waits for a metric, and whether anything was logged with `self.log`. Here the
answers are found when training starts, and a step that needs others is Lightning's own: under a profiler, with gradients that
accumulate over batches, with manual optimization, after a restart until its loop has caught up. Hooks, counters, their order and
their arguments are the same; forward, backward and update still go through the strategy and its precision plugin.

Left out    the division of the loss by one, and the copy of it that only gradients scaled in place would need
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.callbacks import hooks

BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class LeanStep:
    """`advance` of a Trainer's training epoch loop.

    Args:
        trainer: about to train.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer, self.module, self.strategy = trainer, trainer.lightning_module, trainer.strategy
        self.fit_loop, self.loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self.theirs: Callable[[_DataFetcher], None] = self.loop.advance
        self.takes_index = is_param_in_hook_signature(self.module.training_step, "batch_idx", min_args=2)
        self.ranks = trainer.world_size
        self._callbacks = partial(hooks.callbacks, trainer, self.module)
        self._hook = partial(hooks.of_module, self.module)
        self._named = partial(hooks.named, self.module)
        self.before_transfer, self.transfer, self.after_transfer = map(self._batch_hook, BATCH_HOOKS)

    @staticmethod
    def fits(trainer: L.Trainer) -> bool:
        """Whether nothing stands in the way for this run."""
        return (
            trainer.state.fn == TrainerFn.FITTING
            and type(trainer.profiler) is PassThroughProfiler
            and trainer.lightning_module.automatic_optimization
            and len(trainer.optimizers) == 1
            and not trainer.strategy.handles_gradient_accumulation
            and not any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs)
        )

    def advance(self, fetcher: _DataFetcher) -> None:
        """Take one batch, and one step.

        Raises:
            StopIteration: there is no other batch, or a hook `on_train_batch_start` has returned -1.
        """
        loop, strategy = self.loop, self.strategy
        if self._is_unusual(fetcher):
            return self.theirs(fetcher)
        if loop.val_loop.restarting:
            loop.val_loop.restarting = False
        if self.ranks > 1:
            loop._broadcast_sigterm_tensor()
        batch, _, _ = next(fetcher)
        index, progress = loop.batch_idx + 1, loop.batch_progress
        progress.is_last_batch = fetcher.done
        batch = self._move(strategy.precision_plugin.convert_input(batch))
        progress.increment_ready()
        self._open(batch)
        outputs, skip = None, False
        if batch is None:
            loop._warning_cache.warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
        else:
            self._callbacks("on_train_batch_start", batch, index)
            skip = self._hook("on_train_batch_start", batch, index) == -1
            self._named("on_train_batch_start", strategy.on_train_batch_start, batch, index)
            if skip:
                progress.increment_by(0, is_last_batch=True)
            else:
                progress.increment_started()
                outputs = self._optimize(strategy.optimizers[0], batch, index)
        progress.increment_processed()
        loop._update_learning_rates("step", update_plateau_schedulers=False)
        if loop._num_ready_batches_reached():
            loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)
        if skip:
            raise StopIteration
        self._callbacks("on_train_batch_end", outputs, batch, index)
        self._hook("on_train_batch_end", outputs, batch, index)
        self._close(progress)
        return None

    def _is_unusual(self, fetcher: _DataFetcher) -> bool:
        asked = self.loop.restarting or self.trainer.accumulate_grad_batches != 1
        return asked or isinstance(fetcher, _DataLoaderIterDataFetcher)

    # ------------------------------------------------------------------ forward, backward, update

    def _optimize(self, optimizer: Optimizer, batch: Any, index: int) -> dict[str, Any]:
        """The outputs of the step: its loss, and what else it returned by name."""
        strategy, progress = self.strategy, self.loop.automatic_optimization.optim_progress.optimizer
        words, epoch, outputs = (batch, index) if self.takes_index else (batch,), self.trainer.current_epoch, {}

        def closure() -> Tensor | None:
            with torch.enable_grad():
                result = self._named("training_step", strategy.training_step, *words)
                strategy.post_training_step()
                if type(result) is Tensor:
                    loss, outputs["loss"] = result, result.detach()
                else:
                    loss = self._read(result, outputs)
                progress.zero_grad.increment_ready()
                self._callbacks("on_before_zero_grad", optimizer)
                self._hook("on_before_zero_grad", optimizer)
                progress.zero_grad.increment_started()
                self._hook("optimizer_zero_grad", epoch, index, optimizer)
                progress.zero_grad.increment_completed()
                if loss is not None:
                    self._named("backward", strategy.backward, loss, optimizer)
                return outputs.get("loss")

        progress.step.increment_ready()
        self._hook("optimizer_step", epoch, index, strategy._lightning_optimizers[0], closure)
        progress.step.increment_completed()
        return outputs

    def _read(self, result: Any, outputs: dict[str, Any]) -> Tensor | None:
        """What else a training_step may return: a subclass of Tensor, a dict with a loss, None for no step."""
        if result is None and self.ranks > 1:
            raise RuntimeError("training_step returned None on one of several ranks, which the others would wait for")
        read = self.loop.automatic_optimization.output_result_cls.from_training_step_output(result)
        if read.closure_loss is not None:
            outputs.update(read.asdict())
        return read.closure_loss

    # ------------------------------------------------------------------ the batch

    def _batch_hook(self, name: str) -> Callable[..., Any] | None:
        """The hook of the data module, or else of the module; None where it is the one that does nothing."""
        owner = self.trainer._data_connector._datahook_selector.get_instance(name)
        hook = getattr(owner, name)
        if name != "transfer_batch_to_device" and getattr(hook, "__func__", hook) is getattr(DataHooks, name):
            return None
        return hook if owner is not self.module else partial(hooks.of_module, self.module, name)

    def _move(self, batch: Any) -> Any:
        """The batch on the device; by the module or the data module, whichever says how."""
        if self.before_transfer is not None:
            batch = self.before_transfer(batch, 0)
        batch = self.transfer(batch, self.strategy.root_device, 0)
        return batch if self.after_transfer is None else self.after_transfer(batch, 0)

    # ------------------------------------------------------------------ what `self.log` needs

    def _open(self, batch: Any) -> None:
        connector, results = self.trainer._logger_connector, self.loop._results
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None

    def _close(self, progress: Any) -> None:
        connector, results = self.trainer._logger_connector, self.loop._results
        if results:  # something was logged with self.log
            connector.on_batch_end()
        results.batch = results.batch_size = None
        progress.increment_completed()
        if results:
            connector.update_train_step_metrics()
