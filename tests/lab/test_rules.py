"""A setting that would be ignored, or that contradicts how a run is made here, is refused with the fix."""

from typing import Any

import pytest
from jsonargparse import Namespace

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.rules import FIXED, check_parsed, check_tree
from blagpt_pl.lab.train import DEFAULTS

MODEL = "blagpt_pl.models.blagpt.BlaGPT"
TRAINER = {
    "logger": None, "callbacks": None, "fast_dev_run": False, "max_epochs": -1, "min_epochs": None, "max_steps": 5, "min_steps": None,
    "limit_train_batches": None, "limit_val_batches": None, "limit_test_batches": None, "limit_predict_batches": None,
    "overfit_batches": 0.0, "val_check_interval": None, "enable_checkpointing": None, "accumulate_grad_batches": 1,
    "gradient_clip_val": None, "gradient_clip_algorithm": None, "barebones": False, "sync_batchnorm": False,
    "reload_dataloaders_every_n_epochs": 0, "default_root_dir": None, "enable_autolog_hparams": True, "model_registry": None,
    **DEFAULTS,
}  # fmt: skip


def check(command: str = "fit", monitor: str = "val/loss", model: str = MODEL, **trainer: object) -> None:
    """`check_parsed` on a healthy configuration with changes of the Trainer."""
    settings: Any = Namespace(
        trainer=Namespace(**{**TRAINER, **trainer}),
        checkpoint=Namespace(monitor=monitor),
        model=Namespace(class_path=model),
    )
    check_parsed(settings, command)


def callbacks(*paths: str) -> list[Namespace]:
    return [Namespace(class_path=path) for path in paths]


def test_what_is_healthy_passes() -> None:
    for command in ("fit", "validate", "test"):
        check(command)
    check("validate", max_steps=-1)
    check(fast_dev_run=True, max_steps=-1)
    check(max_epochs=None, limit_val_batches=1.0, enable_checkpointing=True)
    check(limit_val_batches=0)
    check(
        val_check_interval=3, log_every_n_steps=1, gradient_clip_val=1.0, gradient_clip_algorithm="value", min_steps=5
    )
    check(gradient_clip_val=0, logger=callbacks("lightning.pytorch.loggers.CSVLogger"))
    check(callbacks=callbacks("lightning.pytorch.callbacks.LearningRateMonitor", "blagpt_pl.callbacks.unigram.Unigram"))


REFUSED = [
    ({"accumulate_grad_batches": 2}, "data.device_batch_size"),
    ({"max_epochs": 3}, "not epochs; fix: trainer.max_steps"),
    ({"min_epochs": 1}, "not epochs; fix: trainer.max_steps"),
    ({"check_val_every_n_epoch": 1}, "fix: trainer.val_check_interval: STEPS"),
    ({"use_distributed_sampler": True}, "fix: leave it out"),
    ({"reload_dataloaders_every_n_epochs": 1}, "fix: leave it out"),
    ({"limit_train_batches": 10}, "trainer.max_steps"),
    ({"limit_train_batches": 1}, "trainer.max_steps"),
    ({"limit_val_batches": 1}, "data.val_tokens"),
    ({"limit_val_batches": 0.5}, "data.val_tokens"),
    ({"limit_test_batches": 2}, "data.test_tokens"),
    ({"limit_predict_batches": 2}, "nothing is predicted"),
    ({"overfit_batches": 1}, "data.source"),
    ({"overfit_batches": 0.1}, "data.source"),
    ({"sync_batchnorm": True}, "later tokens"),
    ({"barebones": True}, "leave it out"),
    ({"enable_checkpointing": False}, "checkpoint.every_n_steps"),
    ({"enable_autolog_hparams": False}, "config.yaml"),
    ({"model_registry": "x"}, "leave it out"),
    ({"default_root_dir": "x"}, "fix: logs"),
    ({"max_steps": -1}, "1 or more"),
    ({"max_steps": 0}, "1 or more"),
    ({"min_steps": 6}, "at most trainer.max_steps, 5"),
    ({"val_check_interval": 0.5}, "whole number of optimizer steps"),
    ({"val_check_interval": 1.0}, "whole number of optimizer steps"),
    ({"val_check_interval": 0}, "whole number of optimizer steps"),
    ({"val_check_interval": "00:00:15:00"}, "whole number of optimizer steps"),
    ({"log_every_n_steps": 0}, "1 or more"),
    ({"logger": False}, "false, but a run writes its own log"),
    ({"gradient_clip_val": -1.0}, "0 or more"),
    ({"gradient_clip_val": float("nan")}, "0 or more"),
    ({"gradient_clip_algorithm": "nrom", "gradient_clip_val": 1.0}, "expected norm or value"),
    ({"gradient_clip_algorithm": "norm"}, "does nothing here; fix: trainer.gradient_clip_val"),
    ({"callbacks": callbacks("blagpt_pl.callbacks.samples.Samples")}, "its options stand under samples"),
    ({"callbacks": callbacks("blagpt_pl.callbacks.stop.GracefulStop")}, "in every run already; fix: leave it out"),
    ({"callbacks": callbacks("lightning.pytorch.callbacks.ModelCheckpoint")}, "checkpoints of its own"),
    ({"callbacks": callbacks("lightning.pytorch.callbacks.RichProgressBar")}, "a progress bar of its own"),
    ({"callbacks": callbacks("lightning.pytorch.callbacks.RichProgressBar")[0]}, "a progress bar of its own"),
]


@pytest.mark.parametrize(("trainer", "words"), REFUSED)
def test_refused(trainer: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(**trainer)
    said = str(error.value)
    assert said.startswith(f"trainer.{next(iter(trainer))}: ")
    assert words in said
    assert "\n" not in said


def test_every_fixed_setting_has_a_case() -> None:
    assert set(FIXED) <= {name for case, _ in REFUSED for name in case}


@pytest.mark.parametrize("monitor", ["val/bpb", "val/perplexity"])
def test_monitors(monitor: str) -> None:
    check(monitor=monitor)


@pytest.mark.parametrize("monitor", ["val/los", "train/loss", "loss", "", "val_loss", "test/loss"])
def test_a_monitor_that_is_never_logged(monitor: str) -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint\.monitor: .*expected val/loss, val/bpb"):
        check(monitor=monitor)


def test_a_model_with_its_own_ruler_may_log_what_it_likes(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger_ruler.py").write_text(
        "from blagpt_pl.models.blagpt import BlaGPT\nclass Own(BlaGPT):\n    def validation_step(self, batch, batch_idx): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check(monitor="val/elbo", model="stranger_ruler.Own")
    with pytest.raises(ConfigError, match="not logged by validation"):
        check(monitor="elbo", model="stranger_ruler.Own")
    check(monitor="val/mine", callbacks=callbacks("lightning.pytorch.callbacks.LearningRateMonitor"))


@pytest.mark.parametrize(
    ("tree", "begins"),
    [
        ({"model": {"class_path": "BlaGPT", "init_args": {"context": 8}}}, "model.context: is taken from data.context; fix: write data.context: 8"),
        ({"model": {"context": 8}}, "model.context: is taken from data.context"),
        ({"model": {"class_path": "BlaGPT", "init_args": {"context": None}}}, "model.context: is taken"),
        ({"trainer": None}, "trainer: null (expected options, such as trainer.max_steps)"),
        ({"data": [1]}, "data: [1] (expected options, such as data.batch_size)"),
        ({"checkpoint": 3}, "checkpoint: 3 (expected options"),
        ({"samples": "x"}, "samples: 'x' (expected options"),
        ({"step_time": False}, "step_time: false (expected options"),
        ({"name": ""}, "name: '' (expected the name of one folder)"),
        ({"name": "a/b"}, "name: 'a/b' (expected"),
        ({"name": ".."}, "name: '..' (expected"),
        ({"seed_everything": None}, "seed_everything: null (expected a whole number"),
        ({"seed_everything": True}, "seed_everything: true (expected a whole number"),
        ({"seed_everything": -1}, "seed_everything: -1 (expected a whole number"),
        ({"seed_everything": 2**32}, "seed_everything: 4294967296 (expected a whole number"),
        ({"model": {"class_path": "BlaGPT", "init_args": {"bogus": {}}}}, "model.bogus: BlaGPT has no such option"),
        ({"trainer": {"bogus": {}}}, "trainer.bogus: Trainer has no such option"),
    ],
)  # fmt: skip
def test_trees_that_are_refused(tree: dict, begins: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_tree(tree)
    assert str(error.value).startswith(begins)


@pytest.mark.parametrize(
    "tree",
    [
        {}, {"model": "BlaGPT"}, {"model": None}, {"model": {"class_path": "BlaGPT"}}, {"model": {"class_path": "BlaGPT", "init_args": None}},
        {"name": "a-b_c.2"}, {"name": 3}, {"seed_everything": 0}, {"checkpoint": {}}, {"trainer": {}, "data": {}},
        {"model": {"class_path": "BlaGPT", "init_args": {"norm": {"class_path": "RMSNorm", "init_args": {}}}}},
    ],
)  # fmt: skip
def test_trees_that_pass(tree: dict) -> None:
    check_tree(tree)
