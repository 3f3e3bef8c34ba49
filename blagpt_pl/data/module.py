"""The data module: a source of shards, cut into training steps and into one fixed set of validation and test tokens.

What     a training batch is one whole optimizer step, (A, b, T) inputs and targets; an evaluation batch is
         (inputs, targets, n_bytes). Validation is the first `val_tokens` targets of the validation files, test the
         `test_tokens` right after them.
Differs  from a usual LightningDataModule: no DataLoader, no sampler, no position to save. Training starts at the
         trainer's optimizer step, so resuming and changing the number of ranks repeat nothing and lose nothing
Cost     0 workers and 1 reading thread; on CUDA a few pinned buffers of a step each (`data/buffers.py`); every file's
         header is read at the start, on every rank
"""

import warnings

import lightning as L
import numpy as np
import torch
from torch import Tensor

from blagpt_pl.data.shards import ShardSet
from blagpt_pl.data.sources import Source
from blagpt_pl.data.stream import EvalBatch, EvalBatches, TokenStream, TrainBatches, check_batch, split
from blagpt_pl.data.tokenizers import Tokenizer
from blagpt_pl.errors import CheckpointError, ConfigError, DataError


class TokenData(L.LightningDataModule):
    """Token shards for any model. `batch_size` counts sequences of a step over all ranks; `device_batch_size` those of
    one forward pass on one rank; what lies between them is accumulated."""

    def __init__(
        self,
        source: Source,
        context: int,
        batch_size: int,
        device_batch_size: int,
        val_tokens: int,
        test_tokens: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        super().__init__()
        counts = {"context": context, "batch_size": batch_size, "device_batch_size": device_batch_size}
        for name, value in {**counts, "val_tokens": val_tokens, "test_tokens": test_tokens}.items():
            if value is not None and value < 1:
                raise ConfigError(
                    f"data.{name}: {value} (expected 1 or more); fix: set data.{name} to a positive number"
                )
        if shuffle_seed is not None and shuffle_seed < 0:
            raise ConfigError(
                f"data.shuffle_seed: {shuffle_seed} (expected 0 or more); fix: null keeps the order of the files"
            )
        self.source = source
        self.context = context
        self.batch_size = batch_size
        self.device_batch_size = device_batch_size
        self.val_tokens = val_tokens
        self.test_tokens = test_tokens
        self.shuffle_seed = shuffle_seed
        self._train_batches: TrainBatches | None = None

    def __str__(self) -> str:
        """Lightning's own `__str__` opens every loader and fails on those that are no DataLoader."""
        sizes = f"context={self.context}, batch_size={self.batch_size}, device_batch_size={self.device_batch_size}"
        return f"{type(self).__name__}({type(self.source).__name__}, {sizes})"

    @property
    def tokenizer(self) -> Tokenizer:
        return self.source.tokenizer

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.context

    @property
    def accumulation(self) -> int:
        """Micro-batches of one rank in one optimizer step."""
        return check_batch(self.batch_size, self.device_batch_size, self._rank_and_world()[1])

    def prepare_data(self) -> None:
        """On one process a node: fetch, then check all that can be checked before a model is trained on it."""
        self._check_trainer()
        self.source.fetch()
        self._open()
        self._byte_lengths()  # fetches the tokenizer's tables once, not once a rank

    def setup(self, stage: str | None = None) -> None:
        """On every rank: open the shards (and check them here too: no rank is left waiting for one that stopped)."""
        self._check_trainer()
        self.train_shards, self.val_shards = self._open()
        self._fingerprint = self.train_shards.fingerprint()
        self.byte_lengths = self._byte_lengths()
        if self.byte_lengths is None and self._rank_and_world()[0] == 0:
            warnings.warn(
                "data: no byte lengths of tokens, so val/bpb and samples are left out; fix: set TIKTOKEN_CACHE_DIR to "
                "a folder that holds the tokenizer's tables, or run once with a network",
                stacklevel=2,
            )

    def train_dataloader(self) -> TrainBatches:
        stream = TokenStream(self.train_shards, self.context, self.shuffle_seed)
        rank, world = self._rank_and_world()
        trainer, device = self.trainer, self._pinning_device()
        self._train_batches = TrainBatches(
            stream, self.batch_size, self.device_batch_size, rank, world, lambda: trainer.global_step, device
        )
        return self._train_batches

    def val_dataloader(self) -> EvalBatches:
        return self._eval_batches(0, self.val_tokens)

    def test_dataloader(self) -> EvalBatches:
        if self.test_tokens is None:
            raise ConfigError(
                "data.test_tokens: null (expected a number of tokens to test on); fix: set data.test_tokens"
            )
        return self._eval_batches(self.val_tokens, self.test_tokens)

    def transfer_batch_to_device(self, batch: Tensor | EvalBatch, device: torch.device, dataloader_idx: int) -> object:
        """Lightning's copy, which from pinned memory runs on after this has returned; then an event behind it."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if device.type == "cuda" and isinstance(batch, Tensor) and self._train_batches is not None:
            self._train_batches.give_back(batch, torch.cuda.current_stream(device).record_event())
        return moved

    def on_after_batch_transfer(self, batch: Tensor | EvalBatch, dataloader_idx: int) -> tuple[Tensor, ...]:
        """Cast and shift on the device: half the bytes cross the bus, and each of them once."""
        if isinstance(batch, EvalBatch):
            return *split(batch.tokens), batch.n_bytes  # (b, T), (b, T), ()
        return split(batch)  # (A, b, T), (A, b, T)

    def state_dict(self) -> dict[str, str | int | None]:
        """What a resumed run must agree on for sample k·batch_size to be the first it has not seen at step k."""
        return {
            "fingerprint": self._fingerprint,
            "batch_size": self.batch_size,
            "context": self.context,
            "shuffle_seed": self.shuffle_seed,
        }

    def load_state_dict(self, state_dict: dict[str, str | int | None]) -> None:
        """Lightning calls this after `setup`, also to validate or test a checkpoint, where only the weights matter."""
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        for name, here in self.state_dict().items():
            saved = state_dict.get(name)
            if saved != here:
                field, back = f"data.{name}", f"set data.{name} back to {'null' if saved is None else saved}"
                if name == "fingerprint":
                    field, back = "data.source: fingerprint of the training shards", "restore the files and their order"
                raise CheckpointError(
                    f"{field}: {here} (expected {saved}, the checkpoint's); fix: {back}, or start a new run"
                )

    def _rank_and_world(self) -> tuple[int, int]:
        """Data-parallel rank and world size: ranks of one tensor-parallel group are one reader."""
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if layout is None else (layout["rank"], layout["num_replicas"])

    def _pinning_device(self) -> torch.device | None:
        device = self.trainer.strategy.root_device
        return device if device.type == "cuda" else None

    def _eval_batches(self, first: int, n_tokens: int) -> EvalBatches:
        rank, world = self._rank_and_world()
        pin = self._pinning_device() is not None
        b = self.device_batch_size
        return EvalBatches(self.val_shards, first, n_tokens, self.context, b, rank, world, self.byte_lengths, pin)

    def _byte_lengths(self) -> np.ndarray | None:
        try:
            return self.tokenizer.byte_lengths()
        except DataError:
            return None

    def _check_trainer(self) -> None:
        """Settings of the trainer and the model that would change what a step or a measurement is."""
        trainer = self.trainer
        _, world = self._rank_and_world()
        check_batch(self.batch_size, self.device_batch_size, world)
        if trainer is None:
            return
        if trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches: {trainer.accumulate_grad_batches} (expected 1: it follows from "
                f"data.batch_size, data.device_batch_size and the ranks); fix: set data.device_batch_size instead"
            )
        if trainer.overfit_batches:
            raise ConfigError(
                f"trainer.overfit_batches: {trainer.overfit_batches} (expected 0: batches follow from the step); "
                f"fix: train on a source that is as small as you want"
            )
        for name, tokens in {"val": "val_tokens", "test": "test_tokens"}.items():
            limit = getattr(trainer, f"limit_{name}_batches")
            whole = isinstance(limit, float) and limit == 1.0  # an int 1 is one batch
            if limit and not whole and not trainer.fast_dev_run:
                raise ConfigError(
                    f"trainer.limit_{name}_batches: {limit} (expected 1.0: exactly data.{tokens} tokens are measured); "
                    f"fix: set data.{tokens} instead"
                )
        needed = self.tokenizer.vocab_size
        model_vocab_size = getattr(trainer.lightning_module, "vocab_size", None)
        if model_vocab_size is not None and needed > model_vocab_size:
            raise ConfigError(
                f"model.vocab_size: {model_vocab_size} (expected {needed} or more, the vocabulary of "
                f"{type(self.tokenizer).__name__}); fix: set model.vocab_size to {needed} or more"
            )

    def _open(self) -> tuple[ShardSet, ShardSet]:
        """The training and validation shards, whole, apart from each other, and large enough."""
        vocab_size = self.tokenizer.vocab_size
        train = ShardSet.open(self.source.train_files(), vocab_size)
        val = ShardSet.open(self.source.val_files(), vocab_size)
        trained_on = dict(zip(train.digests(), train.shards, strict=True))
        for digest, shard in zip(val.digests(), val.shards, strict=True):
            if digest in trained_on:
                raise ConfigError(
                    f"data.source: {shard.path} of the validation files is also in the training files, as "
                    f"{trained_on[digest].path} (expected files apart); fix: take it out of one of them"
                )
        wanted = self.val_tokens + (self.test_tokens or 0) + 1
        if val.n_tokens < wanted:
            fields = "data.val_tokens" if self.test_tokens is None else "data.val_tokens + data.test_tokens"
            raise DataError(
                f"data: {len(val.shards)} validation files hold {val.n_tokens} tokens (expected {wanted} = {fields} + "
                f"1 or more); fix: lower {fields} to {val.n_tokens - 1}, or add files"
            )
        windows = (train.n_tokens - 1) // self.context
        if windows < self.batch_size:
            raise DataError(
                f"data: {len(train.shards)} training files hold {train.n_tokens} tokens, {windows} windows of "
                f"data.context {self.context} (expected {self.batch_size} or more, one data.batch_size); "
                f"fix: lower data.batch_size, or add files"
            )
        return train, val
