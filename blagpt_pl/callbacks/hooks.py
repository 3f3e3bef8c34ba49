"""Lightning's dispatch of hooks, without what it does for hooks that do nothing.

In each step Lightning calls a dozen hooks of the module and six of every callback. Around each call it puts a profiler's
context, a line for the debug log, and two writes of `_current_fx_name` through `nn.Module.__setattr__`; also where the hook
is the empty one of the base class. Here a hook is called if somebody has written it, and the name goes to `__dict__`. Order,
arguments, results, counters, loops, strategies and precision stay Lightning's. Under a profiler, everything does: it shall
see each call.

Cost     less than half of the Python calls of a step that computes next to nothing (`blagpt bench overhead`)
"""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call

NAMES = ("_call_callback_hooks", "_call_lightning_module_hook", "_call_strategy_hook")
EMPTY = (  # of LightningModule; those of Callback all are
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step",
)  # fmt: skip
STOCK = {name: getattr(call, name) for name in NAMES}
_CALLBACKS, _MODULE, _STRATEGY = STOCK.values()
_EMPTY = {name: getattr(L.LightningModule, name) for name in EMPTY}


def callbacks(trainer: L.Trainer, module: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> None:
    """Call the hook of each callback that has written it."""
    if written := _written(trainer, name):
        before, module.__dict__["_current_fx_name"] = module._current_fx_name, name
        for hook in written:
            hook(trainer, module, *args, **kwargs)
        module.__dict__["_current_fx_name"] = before


def _written(trainer: L.Trainer, name: str) -> list[Callable[..., None]]:
    """The callbacks' hooks of this name that are not the empty one; looked for anew where the list of callbacks has changed."""
    found, now = vars(trainer).setdefault("_written_hooks", {}), tuple(trainer.callbacks)
    known, written = found.get(name, ((), []))
    if known != now:
        empty = getattr(L.Callback, name, None)
        hooks = [getattr(callback, name) for callback in now]
        written = [hook for hook in hooks if getattr(hook, "__func__", hook) is not empty and callable(hook)]
        found[name] = now, written
    return written


def of_module(module: L.LightningModule, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a hook of the module, and take its result, unless it is an empty one."""
    hook = getattr(module, name)
    if getattr(hook, "__func__", hook) is _EMPTY.get(name) or not callable(hook):
        return None
    return named(module, name, hook, *args, **kwargs)


def named(module: L.LightningModule, name: str, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a hook as the one that `self.log` is to see."""
    before, module.__dict__["_current_fx_name"] = module._current_fx_name, name
    result = hook(*args, **kwargs)
    module.__dict__["_current_fx_name"] = before
    return result


def _call_callback_hooks(
    trainer: L.Trainer, hook_name: str, *args: Any, monitoring_callbacks: bool | None = None, **kwargs: Any
) -> None:
    module = trainer.lightning_module
    if type(trainer.profiler) is not PassThroughProfiler or monitoring_callbacks is not None or module is None:
        return _CALLBACKS(trainer, hook_name, *args, monitoring_callbacks=monitoring_callbacks, **kwargs)
    return callbacks(trainer, module, hook_name, *args, **kwargs)


def _call_lightning_module_hook(
    trainer: L.Trainer, hook_name: str, *args: Any, pl_module: L.LightningModule | None = None, **kwargs: Any
) -> Any:
    module = pl_module or trainer.lightning_module
    if type(trainer.profiler) is not PassThroughProfiler or module is None:
        return _MODULE(trainer, hook_name, *args, pl_module=pl_module, **kwargs)
    return of_module(module, hook_name, *args, **kwargs)


def _call_strategy_hook(trainer: L.Trainer, hook_name: str, *args: Any, **kwargs: Any) -> Any:
    if type(trainer.profiler) is not PassThroughProfiler:
        return _STRATEGY(trainer, hook_name, *args, **kwargs)
    return named(trainer.lightning_module, hook_name, getattr(trainer.strategy, hook_name), *args, **kwargs)


OURS = dict(zip(NAMES, (_call_callback_hooks, _call_lightning_module_hook, _call_strategy_hook), strict=True))


class _Uses:
    """How many trainings go through them, in this process."""

    number = 0


def use(more: int) -> None:
    """Let Lightning dispatch as above while somebody trains.

    Args:
        more: 1 at the start of a training, -1 at its end.
    """
    _Uses.number += more
    for name, function in (OURS if _Uses.number else STOCK).items():
        setattr(call, name, function)
