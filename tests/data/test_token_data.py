"""The data module inside a real Trainer: resuming at any step, the exact evaluation set, and every refusal."""

import os
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from blagpt_pl.data import ByteTokenizer, GPT2Tokenizer, ShardFiles, TokenData, write_shard
from blagpt_pl.errors import CheckpointError, ConfigError, DataError

# Lightning 2.6.6 itself makes this one with torch 2.13, at every loader
no_warnings = pytest.mark.filterwarnings("error", "ignore:.isinstance.treespec, LeafSpec:FutureWarning")
SHARED = Path(__file__).resolve().parents[2].parent / "shared/data"


class Recorder(L.LightningModule):
    """A model of one weight that writes down what it is given, one whole optimizer step a batch."""

    def __init__(self, vocab_size: int = 257, die_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.vocab_size = vocab_size
        self.die_at = die_at
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: dict[int, Tensor] = {}  # step: (A, b, T) inputs
        self.measured: list[tuple[Tensor, ...]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        assert inputs.dtype == targets.dtype == torch.int64 and inputs.shape == targets.shape
        if self.global_step == self.die_at:
            raise KeyboardInterrupt
        self.trained[self.global_step] = inputs
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward((self.weight - inputs.double().mean()) ** 2)
        optimizer.step()

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.measured.append(batch)
        self.log("val/loss", self.weight, batch_size=1)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """41 training windows of 10 tokens over two files, and 90 validation tokens, all different within a file."""
    write_shard(tmp_path / "t0.bin", [i % 251 for i in range(200)], 257)
    write_shard(tmp_path / "t1.bin", [(7 * i) % 251 for i in range(211)], 257)
    write_shard(tmp_path / "v0.bin", range(90), 257)
    return tmp_path


def token_data(folder: Path, **changes: object) -> TokenData:
    source = ShardFiles([f"{folder}/t*.bin"], [f"{folder}/v*.bin"], ByteTokenizer())
    settings = {"context": 10, "batch_size": 6, "device_batch_size": 2, "val_tokens": 45, "shuffle_seed": 3}
    return TokenData(**({"source": source, **settings} | changes))


def trainer(folder: Path, **settings: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    shape = {
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 4,
        "use_distributed_sampler": False,
    }
    defaults = {"devices": 1, "enable_checkpointing": False, "default_root_dir": folder, "num_sanity_val_steps": 0}
    return L.Trainer(**({**quiet, **shape, **defaults} | settings))


class Save(L.Callback):
    """A checkpoint at every step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


@no_warnings
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(folder: Path) -> None:
    """17 steps of 6 samples are more than 2 epochs of 41 windows; it is resumed at each of its first 12 steps."""
    whole = Recorder()
    trainer(folder, max_steps=17).fit(whole, datamodule=token_data(folder))
    assert sorted(whole.trained) == list(range(17))
    assert all(inputs.shape == (3, 2, 10) for inputs in whole.trained.values())
    assert len(whole.measured) == 4 * 3  # validated at 4, 8, 12, 16; 45 targets are 5 windows, 3 batches of 2

    first = Recorder(die_at=12)
    with pytest.raises(SystemExit):
        trainer(folder, max_steps=17, callbacks=[Save()]).fit(first, datamodule=token_data(folder))
    assert sorted(first.trained) == list(range(12))
    for start in range(1, 13):
        resumed = Recorder()
        data = token_data(folder, device_batch_size=3)  # other micro-batches, same samples
        again = trainer(folder, max_steps=17)
        again.fit(resumed, datamodule=data, ckpt_path=folder / f"{start}.ckpt", weights_only=True)
        assert sorted(resumed.trained) == list(range(start, 17))
        for step, inputs in resumed.trained.items():
            assert inputs.shape == (2, 3, 10)
            assert torch.equal(inputs.view(6, 10), whole.trained[step].view(6, 10)), (start, step)
        assert torch.equal(resumed.weight, whole.weight)
        # Lightning takes a validation that was due at the very step of the checkpoint as done
        assert len(resumed.measured) == sum(2 for step in (4, 8, 12, 16) if step > start)
    windows = torch.cat([inputs.view(6, 10) for inputs in whole.trained.values()])[:82].tolist()
    assert sorted(windows[:41]) == sorted(windows[41:])  # two whole epochs, in two orders
    assert windows[:41] != windows[41:]


def test_a_second_epoch_of_lightning_goes_on_where_the_first_ended(folder: Path) -> None:
    whole, cut = Recorder(), Recorder()
    trainer(folder, max_steps=12).fit(whole, datamodule=token_data(folder))
    trainer(folder, max_steps=12, limit_train_batches=5).fit(cut, datamodule=token_data(folder))
    assert sorted(cut.trained) == list(range(12))
    assert all(torch.equal(whole.trained[step], cut.trained[step]) for step in range(12))


@no_warnings
def test_validation_and_test_are_exact_and_apart(folder: Path) -> None:
    model, data = Recorder(), token_data(folder, test_tokens=44)
    trainer(folder).validate(model, datamodule=data, verbose=False)
    validated, model.measured = model.measured, []
    trainer(folder).test(model, datamodule=data, verbose=False)
    for measured, wanted in ((validated, range(1, 46)), (model.measured, range(46, 90))):
        targets = torch.cat([targets[targets != -100] for _, targets, _ in measured])
        assert targets.tolist() == list(wanted)
        assert sum(int(n_bytes) for *_, n_bytes in measured) == len(wanted)
        assert all(inputs.shape == targets.shape == (2, 10) for inputs, targets, _ in measured)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """`distributed_sampler_kwargs` is where Lightning's strategies tell the data-parallel rank."""

    def batch(rank: int, world: int) -> Tensor:
        ranks = {"rank": rank, "num_replicas": world}
        monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", ranks)
        data = token_data(folder, device_batch_size=1)
        data.trainer = trainer(folder)
        data.trainer.strategy.connect(Recorder())
        data.setup("fit")
        assert data.accumulation == 6 // world
        return next(iter(data.train_dataloader()))

    alone = batch(0, 1)  # (6, 1, T+1)
    shared = [batch(rank, world) for rank in range(world)]  # each (6 / world, 1, T+1)
    assert torch.equal(alone, torch.stack(shared, dim=1).flatten(0, 1))


CHANGES = {
    "batch_size": (
        {"batch_size": 12},
        "data.batch_size: 12 (expected 6, the checkpoint's); fix: set data.batch_size back",
    ),
    "context": ({"context": 9}, "data.context: 9 (expected 10, "),
    "shuffle_seed": ({"shuffle_seed": None}, "data.shuffle_seed: None (expected 3, "),
    "files": (None, "data.source: fingerprint of the training shards: "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_data_is_refused(folder: Path, change: str) -> None:
    model = Recorder()
    first = trainer(folder, max_steps=2)
    first.fit(model, datamodule=token_data(folder))
    first.save_checkpoint(folder / "a.ckpt")
    changes, says = CHANGES[change]
    if changes is None:
        os.rename(folder / "t1.bin", folder / "t2.bin")
    data = token_data(folder, **(changes or {}))
    with pytest.raises(CheckpointError) as error:
        trainer(folder, max_steps=4).fit(model, datamodule=data, ckpt_path=folder / "a.ckpt", weights_only=True)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)
    trainer(folder).validate(model, datamodule=data, ckpt_path=folder / "a.ckpt", verbose=False, weights_only=True)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"val_tokens": 0}, ConfigError, "data.val_tokens: 0 (expected 1 or more)"),
        ({"context": 0}, ConfigError, "data.context: 0 (expected 1 or more)"),
        ({"shuffle_seed": -1}, ConfigError, "data.shuffle_seed: -1"),
        (
            {"val_tokens": 90},
            DataError,
            "hold 90 tokens (expected 91 = data.val_tokens + 1 or more); fix: lower data.val_",
        ),
        ({"test_tokens": 45}, DataError, "hold 90 tokens (expected 91 = data.val_tokens + data.test_tokens + 1 "),
        (
            {"batch_size": 42},
            DataError,
            "hold 411 tokens, 41 windows of data.context 10 (expected 42 or more, one data.b",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(folder: Path, changes: dict, error: type, says: str) -> None:
    with pytest.raises(error) as raised:
        token_data(folder, **changes).prepare_data()
    assert says in str(raised.value) and "; fix: " in str(raised.value) and "\n" not in str(raised.value)


def test_the_largest_sizes_that_fit_are_accepted(folder: Path) -> None:
    data = token_data(folder, val_tokens=45, test_tokens=44, batch_size=41, device_batch_size=41)
    data.prepare_data()
    assert str(data) == "TokenData(ShardFiles, context=10, batch_size=41, device_batch_size=41)"


@pytest.mark.parametrize("how", ["symlink_to", "hardlink_to", "copy"])
def test_a_file_in_both_sets_is_refused(folder: Path, how: str) -> None:
    twin = folder / "v1.bin"
    if how == "copy":
        twin.write_bytes((folder / "t0.bin").read_bytes())
    else:
        getattr(twin, how)(folder / "t0.bin")
    with pytest.raises(
        ConfigError, match=r"v1\.bin of the validation files is also in the training files, as .*t0\.bin"
    ):
        token_data(folder).prepare_data()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: 2 (expected 1"),
        ({"overfit_batches": 3}, "trainer.overfit_batches: 3 (expected 0"),
        ({"limit_val_batches": 1}, "trainer.limit_val_batches: 1 (expected 1.0"),
        ({"limit_test_batches": 0.5}, "trainer.limit_test_batches: 0.5 (expected 1.0"),
    ],
)
def test_trainer_settings_that_would_change_the_step_or_the_ruler(folder: Path, settings: dict, says: str) -> None:
    model = Recorder()
    model.automatic_optimization = True  # so that Lightning's own check lets the setting through to ours
    with pytest.raises(ConfigError) as error:
        trainer(folder, max_steps=1, **settings).fit(model, datamodule=token_data(folder))
    assert str(error.value).startswith(says)


def test_model_and_batch_are_checked_at_setup(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.vocab_size: 256 \(expected 257 or more, the vocabulary of ByteTokenizer"
    ):
        trainer(folder, max_steps=1).fit(Recorder(vocab_size=256), datamodule=token_data(folder))
    with pytest.raises(ConfigError, match=r"data\.batch_size: 6 .* one of \[4, 8\], or data\.device_batch_size"):
        trainer(folder, max_steps=1).fit(Recorder(), datamodule=token_data(folder, device_batch_size=4))
    with pytest.raises(ConfigError, match=r"data\.test_tokens: null"):
        trainer(folder).test(Recorder(), datamodule=token_data(folder))
    trainer(folder, fast_dev_run=True).fit(Recorder(), datamodule=token_data(folder))
    trainer(folder, max_steps=1, limit_val_batches=0).fit(Recorder(), datamodule=token_data(folder))


def test_without_the_tokenizers_tables_bytes_are_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    def offline(name: str) -> None:
        raise ConnectionError

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    data = token_data(folder)
    data.source.tokenizer = GPT2Tokenizer()
    model = Recorder(vocab_size=50257)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder).validate(model, datamodule=data, verbose=False)
    about = [str(warning.message) for warning in caught if "val/bpb" in str(warning.message)]
    assert len(about) == 1 and "TIKTOKEN_CACHE_DIR" in about[0]
    assert all(n_bytes == -1 for *_, n_bytes in model.measured)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared shards are not on this machine")
def test_real_shards_and_real_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
    shards = SHARED / "shards"
    source = ShardFiles([f"{shards}/webtext_train_*.bin"], [f"{shards}/webtext_val_*.bin"], GPT2Tokenizer())
    data = TokenData(source, context=1024, batch_size=64, device_batch_size=16, val_tokens=100_000)
    model = Recorder(vocab_size=50304)
    trainer(folder, max_steps=1, val_check_interval=1).fit(model, datamodule=data)
    assert model.trained[0].shape == (4, 16, 1024) and model.trained[0][0, 0, 0] == 50256
    targets = torch.cat([targets[targets != -100] for _, targets, _ in model.measured])
    n_bytes = sum(int(n_bytes) for *_, n_bytes in model.measured)
    text = data.tokenizer.decode([token for token in targets.tolist() if token != 50256])
    assert len(targets) == 100_000
    assert abs(n_bytes - len(text.encode())) <= 4  # the last token may end inside a character
