"""What no type can say: settings that would be ignored, or that contradict the way a run is made here.

A run counts optimizer steps; accumulation, epochs, samplers and limits of batches follow from the data section or do not
exist. So most settings of the Trainer that speak of them may only keep the value that they have here.
"""

from typing import Any

from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.mistakes import SECTIONS, UNKNOWN, imported, mistakes_in, shown
from blagpt_pl.lm import LanguageModel

COUNTS_STEPS = "a run counts optimizer steps, not epochs; fix: trainer.max_steps"
FOLLOWS = "batches follow from the step; fix: leave it out"
FIXED: dict[str, tuple[tuple, str]] = {  # of the Trainer: the values that it may have, and what to say of others
    "accumulate_grad_batches": (
        (1,),
        "accumulation follows from data.batch_size, data.device_batch_size and the ranks; fix: those",
    ),
    "max_epochs": ((-1, None), COUNTS_STEPS),
    "min_epochs": ((None,), COUNTS_STEPS),
    "check_val_every_n_epoch": (
        (None,),
        "a run counts optimizer steps, not epochs; fix: trainer.val_check_interval: STEPS",
    ),
    "use_distributed_sampler": ((False,), FOLLOWS),
    "reload_dataloaders_every_n_epochs": ((0,), FOLLOWS),
    "limit_train_batches": ((None, 1.0), "a run ends at trainer.max_steps; fix: that"),
    "limit_val_batches": (
        (None, 1.0, 0, 0.0),
        "exactly data.val_tokens are measured; fix: data.val_tokens, or 0 for none",
    ),
    "limit_test_batches": ((None, 1.0), "exactly data.test_tokens are measured; fix: data.test_tokens"),
    "limit_predict_batches": ((None, 1.0), "nothing is predicted here; fix: leave it out"),
    "overfit_batches": ((0, 0.0), "batches follow from the step; fix: a smaller data.source"),
    "sync_batchnorm": ((False,), "a batch norm would see later tokens; fix: another norm"),
    "barebones": ((False,), "a run is measured and recorded; fix: leave it out"),
    "enable_checkpointing": ((True, None), "a run can always be resumed; fix: a larger checkpoint.every_n_steps"),
    "enable_autolog_hparams": ((True,), "the resolved configuration stands in config.yaml; fix: leave it out"),
    "model_registry": ((None,), "nothing is uploaded; fix: leave it out"),
    "default_root_dir": ((None,), "a run writes to <logs>/<name>/<k>; fix: logs"),
}
HOUSE = {"Checkpoint": "checkpoint", "Samples": "samples", "StepTime": "step_time"}
ALWAYS = ("PeakVRAM", "GracefulStop", "NonFinite", "Record", "Progress")
MONITORS = ("val/loss", "val/bpb", "val/perplexity")


def check_tree(tree: dict) -> None:
    """Refuse what parsing would silently ignore, or stumble over.

    Raises:
        ConfigError: naming the field, what was found, and the fix.
    """
    for key in SECTIONS:
        if key in tree and not isinstance(tree[key], dict):
            raise ConfigError(f"{key}: {shown(tree[key])} (expected options, such as {key}.{_first_option(key)})")
    model = tree.get("model")
    values = model.get("init_args", model) if isinstance(model, dict) else None
    if isinstance(values, dict) and "context" in values:
        raise ConfigError(
            f"model.context: is taken from data.context; fix: write data.context: {values['context']} instead"
        )
    name = tree.get("name", "run")
    if isinstance(name, str) and (not name.strip() or name.startswith(".") or {"/", "\\", "\0"} & set(name)):
        raise ConfigError(f"name: {name!r} (expected the name of one folder); fix: logs says where it stands")
    seed = tree.get("seed_everything", 0)
    if seed is None or isinstance(seed, bool) or (isinstance(seed, int) and not 0 <= seed < 2**32):
        raise ConfigError(f"seed_everything: {shown(seed)} (expected a whole number from 0 to {2**32 - 1})")
    if _holds_empty(tree):  # `{}` of an unknown field is no value to jsonargparse
        for mistake in mistakes_in(tree):
            if UNKNOWN in mistake.text:
                raise ConfigError(f"{mistake.path}: {mistake.text}")


def _first_option(section: str) -> str:
    return {"trainer": "max_steps", "data": "batch_size", "checkpoint": "every_n_steps", "samples": "prompts"}.get(
        section, "warmup"
    )


def _holds_empty(node: object) -> bool:
    if isinstance(node, dict):
        return any(value == {} or _holds_empty(value) for value in node.values())
    return isinstance(node, list) and any(map(_holds_empty, node))


def check_parsed(settings: Any, command: str = "fit") -> None:
    """Refuse settings that this program derives, that would do nothing, or that would break the ruler.

    Args:
        settings: the parsed configuration.
        command: `fit`, `validate` or `test`; only a fit has a length and a log.

    Raises:
        ConfigError: naming the field, what was found, and the fix.
    """
    trainer = settings.trainer
    for name, (allowed, why) in FIXED.items():
        value = trainer.get(name)
        if not any(value == one and isinstance(value, type(one)) for one in allowed):
            raise ConfigError(f"trainer.{name}: {shown(value)}, but {why}")
    _check_callbacks(trainer.callbacks)
    if command == "fit":
        _check_steps(trainer)
        _check_clipping(trainer)
        _check_monitor(settings)


def _check_steps(trainer: Any) -> None:
    if not trainer.fast_dev_run and trainer.max_steps < 1:
        raise ConfigError(
            f"trainer.max_steps: {trainer.max_steps} (expected the length of the run in optimizer steps, 1 or more)"
        )
    if trainer.min_steps is not None and not trainer.fast_dev_run and trainer.min_steps > trainer.max_steps:
        raise ConfigError(
            f"trainer.min_steps: {trainer.min_steps} (expected at most trainer.max_steps, {trainer.max_steps})"
        )
    interval = trainer.val_check_interval
    if interval is not None and (type(interval) is not int or interval < 1):
        raise ConfigError(
            f"trainer.val_check_interval: {shown(interval)} (expected a whole number of optimizer steps, 1 or more)"
        )
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 1:
        raise ConfigError(f"trainer.log_every_n_steps: {trainer.log_every_n_steps} (expected 1 or more)")
    if trainer.logger is False:
        raise ConfigError(
            "trainer.logger: false, but a run writes its own log; fix: leave it out; logs says where it stands"
        )


def _check_clipping(trainer: Any) -> None:
    value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    if value is not None and not value >= 0:
        raise ConfigError(f"trainer.gradient_clip_val: {value} (expected 0 or more; null for no clipping)")
    if algorithm not in (None, "norm", "value"):
        raise ConfigError(f"trainer.gradient_clip_algorithm: {algorithm!r} (expected norm or value)")
    if algorithm is not None and not value:
        raise ConfigError(
            f"trainer.gradient_clip_algorithm: {algorithm!r} does nothing here; fix: trainer.gradient_clip_val"
        )


def _check_monitor(settings: Any) -> None:
    monitor = settings.checkpoint.monitor
    cls, _ = imported(settings.model.class_path)
    methods = ("validation_step", "on_validation_epoch_end")
    own = any(getattr(cls, name, None) is not getattr(LanguageModel, name) for name in methods)  # may log what it likes
    if monitor not in MONITORS and not ((own or settings.trainer.callbacks) and monitor.startswith("val/")):
        raise ConfigError(
            f"checkpoint.monitor: {monitor!r} is not logged by validation (expected {', '.join(MONITORS)})"
        )


def _check_callbacks(callbacks: Any) -> None:
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        cls, _ = imported(callback.class_path)
        if not isinstance(cls, type):
            continue
        if cls.__module__.startswith("blagpt_pl.") and cls.__name__ in (*HOUSE, *ALWAYS):
            fix = f"its options stand under {HOUSE[cls.__name__]}" if cls.__name__ in HOUSE else "leave it out"
            raise ConfigError(f"trainer.callbacks: {cls.__name__} is in every run already; fix: {fix}")
        if issubclass(cls, Checkpoint | ProgressBar):
            kind = "checkpoints" if issubclass(cls, Checkpoint) else "a progress bar"
            raise ConfigError(
                f"trainer.callbacks: {cls.__name__}, but every run has {kind} of its own; fix: leave it out"
            )
