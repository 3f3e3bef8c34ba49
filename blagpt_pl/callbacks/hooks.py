"""Lightning's dispatch of hooks, without what it does for hooks that do nothing.

In each step Lightning calls a dozen hooks of the module and six of every callback. Around each call it puts a profiler's
context, a line for the debug log, and two writes of `_current_fx_name` through `nn.Module.__setattr__`; also where the hook
is the empty one of the base class. Here a hook is called if somebody has written it, and the name goes to `__dict__`. Order,
arguments, results, counters, loops, strategies and precision stay Lightning's. Under a profiler, everything does: it shall
see each call.

Cost     less than half of the Python calls of a step that computes next to nothing (`blagpt bench overhead`)
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

NAMES = ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook")
EMPTY = (  # of LightningModule; those of Callback all are
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
STOCK = {name: getattr(call, name) for name in NAMES}
_CALLBACKS, _MODULE, _STRATEGY = STOCK.values()
_EMPTY = {name: getattr(L.LightningModule, name) for name in EMPTY}


def _call_callback_hooks(
    trainer: L.Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    module = trainer.lightning_module
    if type(trainer.profiler) is not PassThroughProfiler or monitoring_callbacks is not None or module is None:
        return _CALLBACKS(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
    if written := _written(trainer, hook_name):
        before, module.__dict__["_current_fx_name"] = module._current_fx_name, hook_name
        for hook in written:
            hook(trainer, module, *args, **kwargs)
        module.__dict__["_current_fx_name"] = before


def _written(trainer: L.Trainer, hook_name: str) -> list[Callable[..., None]]:
    """The callbacks' hooks of this name that are not the empty one; looked for anew where the list of callbacks has changed."""
    found, callbacks = vars(trainer).setdefault("_written_hooks", {}), tuple(trainer.callbacks)
    known, written = found.get(hook_name, ((), []))
    if known != callbacks:
        empty = getattr(L.Callback, hook_name, None)
        hooks = [getattr(callback, hook_name) for callback in callbacks]
        written = [hook for hook in hooks if getattr(hook, "__func__", hook) is not empty and callable(hook)]
        found[hook_name] = callbacks, written
    return written


def _call_lightning_module_hook(
    trainer: L.Trainer, hook_name: str, *args: Any, pl_module: L.LightningModule | None = None, **kwargs: Any
) -> Any:
    module = pl_module or trainer.lightning_module
    if type(trainer.profiler) is not PassThroughProfiler or module is None:
        return _MODULE(trainer, hook_name, *args, pl_module=pl_module, **kwargs)
    hook = getattr(module, hook_name)
    if getattr(hook, "__func__", hook) is _EMPTY.get(hook_name) or not callable(hook):
        return None
    before, module.__dict__["_current_fx_name"] = module._current_fx_name, hook_name
    result = hook(*args, **kwargs)
    module.__dict__["_current_fx_name"] = before
    return result


def _call_strategy_hook(trainer: L.Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    module = trainer.lightning_module
    if type(trainer.profiler) is not PassThroughProfiler:
        return _STRATEGY(trainer, hook_name, *args, **kwargs)
    before, module.__dict__["_current_fx_name"] = module._current_fx_name, hook_name
    result = getattr(trainer.strategy, hook_name)(*args, **kwargs)
    module.__dict__["_current_fx_name"] = before
    return result


OURS = dict(zip(NAMES, (_call_callback_hooks, _call_lightning_module_hook, _call_strategy_hook), strict=True))


class LeanHooks(L.Callback):
    """Lets Lightning dispatch as above for as long as a fit trains, and look at the step's signature once."""

    running = 0  # fits that do, in this process

    def __init__(self) -> None:
        self._on = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        names = ("batch", "batch_idx")[
            : 1 + is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
        ]
        trainer.fit_loop.epoch_loop._build_kwargs = lambda _, *values: OrderedDict(zip(names, values, strict=False))
        self._switch(True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("_build_kwargs", None)
        vars(trainer).pop("_written_hooks", None)
        self._switch(False)

    def _switch(self, on: bool) -> None:
        if self._on is not on:
            self._on = on
            LeanHooks.running += 1 if on else -1
            for name, function in (OURS if LeanHooks.running else STOCK).items():
                setattr(call, name, function)
