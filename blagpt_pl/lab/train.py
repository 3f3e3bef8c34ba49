"""`blagpt fit`, `validate` and `test`: LightningCLI over the house's parts, with configuration in layers."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from blagpt_pl.callbacks.atomic_io import AtomicCheckpointIO, read_checkpoint
from blagpt_pl.callbacks.checkpoint import Checkpoint
from blagpt_pl.callbacks.first_step import FirstStep
from blagpt_pl.callbacks.lean import Lean
from blagpt_pl.callbacks.nonfinite import NonFinite
from blagpt_pl.callbacks.progress import Progress
from blagpt_pl.callbacks.record import Record
from blagpt_pl.callbacks.run_logger import RunLogger
from blagpt_pl.callbacks.samples import Samples
from blagpt_pl.callbacks.step_time import StepTime
from blagpt_pl.callbacks.stop import GracefulStop
from blagpt_pl.callbacks.vram import PeakVRAM
from blagpt_pl.data.module import TokenData
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import parts, runs
from blagpt_pl.lab.checkpoint_layer import checkpoint_layer
from blagpt_pl.lab.explain import explained, needs_base, refusals
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.parser import FriendlyParser
from blagpt_pl.lab.quiet import quiet
from blagpt_pl.lab.rules import check_parsed, check_tree
from blagpt_pl.lab.without_donor import without_donor
from blagpt_pl.lm import LanguageModel

DEFAULTS = {
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}
PASSED_ON = ("print_config",)


def house_callbacks(config: str, *sections: L.Callback) -> list[L.Callback]:
    """What every fit has, and the callbacks that have a section of the configuration; all but the progress bar.

    A run that has diverged stops before anybody else looks at its numbers, or samples from it.
    """
    return [NonFinite(), *sections, PeakVRAM(), FirstStep(), GracefulStop(), Record(config), Lean()]


class BlagptCLI(LightningCLI):
    """LightningCLI that reads one merged tree and adds the house's callbacks."""

    def __init__(self, command: str, tree: dict, rest: Iterable[str] = (), run: bool = True) -> None:
        self.command, self.tree, self.rest = command, tree, list(rest)
        self.run_folder: runs.Run | None = None
        self._text = ""
        super().__init__(
            LanguageModel,
            TokenData,
            save_config_callback=None,
            trainer_defaults=DEFAULTS,
            seed_everything_default=1337,
            parser_class=FriendlyParser,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"model", "datamodule", "weights_only"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"dataloaders", "verbose"},
            "test": hidden | {"dataloaders", "verbose"},
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Build only the parser of the command that was called: the others cost a second."""
        whole = self.subcommands
        self.subcommands = lambda: {self.command: whole()[self.command]}
        super()._add_subcommands(parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default="run", help="runs of this name stand together in <logs>/<name>/"
        )
        parser.add_argument("--logs", type=str, default="logs", help="folder of all runs")
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Samples, "samples")
        parser.add_lightning_class_args(StepTime, "step_time")
        parser.link_arguments("data.context", "model.init_args.context")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = ["--config", json.dumps(self.tree), *self.rest]
        self.config = parser.parse_args([self.command, *words] if self._runs else words)

    @property
    def _runs(self) -> bool:
        return hasattr(self, "_subcommand_method_arguments")

    def _parse_ckpt_path(self) -> None:
        """Nothing: what a checkpoint carries is data and never overrides the user's configuration."""

    @property
    def settings(self) -> Any:
        """The parsed configuration of the command."""
        return self.config[self.command] if self._runs else self.config

    def config_text(self) -> str:
        """The resolved configuration, as YAML that can be run again."""
        return self._text

    def before_instantiate_classes(self) -> None:
        """Look at the values, choose the run's folder, and read no donor where a checkpoint of the model's own follows."""
        self._text = self._parser(self.subcommand).dump(self.settings, skip_unset=False)
        if not self._runs:
            return
        check_parsed(self.settings, self.command)
        if self.command == "fit" and not self.settings.trainer.get("fast_dev_run"):
            self.run_folder = self._chosen_run()
        if self.settings.ckpt_path is not None or (self.run_folder is not None and self.run_folder.resume is not None):
            self.settings.model = without_donor(self.settings.model)

    def instantiate_classes(self) -> None:
        with refusals():
            super().instantiate_classes()
            if self._runs and self.command == "fit":
                self.model.configure_schedule(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = self._get(self.config_init, "trainer")
        plugins = trainer.get("plugins") or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        if self.command == "fit" and self._runs and not trainer.get("fast_dev_run"):
            kwargs["logger"] = [self._run_logger(), *self._own_loggers(trainer.get("logger"))]
        else:
            kwargs["logger"] = False
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        if self.command == "fit":
            callbacks = house_callbacks(self.config_text(), *callbacks)
        else:
            callbacks = []
            config["enable_checkpointing"] = False
        if config.get("enable_progress_bar") is not False:
            callbacks.append(Progress())
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, TypeError, ModuleNotFoundError) as error:
            named = re.search(r"`(\w+)` (?:parameter|argument)", str(error))
            at = f"trainer.{named[1]}" if named and named[1] in config else "trainer"
            raise ConfigError(f"{at}: {' '.join(str(error).split())}") from error

    @staticmethod
    def _own_loggers(logger: Any) -> list[Any]:
        return [] if logger in (None, True) else logger if isinstance(logger, list) else [logger]

    def _chosen_run(self) -> runs.Run:
        run = runs.choose(Path(self.settings.logs), self.settings.name, self.config_text())
        if self.settings.ckpt_path is not None and run.resume is None:  # from a named file, in a folder of its own
            return runs.Run(run.folder, Path(self.settings.ckpt_path))
        return run

    def _run_logger(self) -> RunLogger:
        run = self.run_folder
        same_folder = run.resume is not None and run.resume.is_relative_to(run.folder)
        step = None
        if run.resume is not None:
            step = read_checkpoint(run.resume)["global_step"]
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"resuming from {run.resume} (step {step})")
        return RunLogger(run.folder, self.config_text(), step if same_folder else None)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if subcommand == "fit":
            if self.run_folder is not None and self.run_folder.resume is not None:
                kwargs["ckpt_path"] = str(self.run_folder.resume)
        else:
            kwargs["verbose"] = False
            if kwargs.get("ckpt_path") is not None:
                read_checkpoint(kwargs["ckpt_path"])
        return kwargs

    def after_validate(self) -> None:
        self._print_metrics()

    def after_test(self) -> None:
        self._print_metrics()

    def _print_metrics(self) -> None:
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                if "/" in name:
                    print(f"{name:<16}{float(value):,.6g}")


def run(command: str, argv: list[str]) -> None:
    """Run `fit`, `validate` or `test` with the words that follow it."""
    parts.import_all()
    quiet()
    layers = from_arguments(argv, PASSED_ON, None if command == "fit" else checkpoint_layer)
    if any(".help" in word for word in layers.rest):
        layers.tree.setdefault("model", "BlaGPT")  # so that the help of its sockets can be asked for
    elif "--help" not in layers.rest and needs_base(layers.tree):
        other = "" if command == "fit" else ", or --ckpt_path FILE"
        raise ConfigError(f"model: no layer names its class; fix: name a complete --config first{other}")
    with explained(layers):
        check_tree(layers.tree)
        BlagptCLI(command, layers.tree, layers.rest)
