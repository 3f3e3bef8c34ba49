"""A yardstick that any model must beat: the unigram model of the same data, in the ruler's own units.

Formula  p(token) = (count + 1) / (tokens + V) over the training shards; its cross-entropy on the validation tokens
Cost     one pass over at most `tokens` training tokens before training
"""

import math

import lightning as L
import numpy as np


class Unigram(L.Callback):
    """Logs val/unigram_loss and, where byte lengths are known, val/unigram_bpb, once, when training starts.

    Args:
        tokens: how many training tokens to count at most.
    """

    def __init__(self, tokens: int = 20_000_000) -> None:
        self.tokens = tokens
        self.metrics: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule
        train = np.empty(min(self.tokens, data.train_shards.n_tokens), dtype=np.int32)
        targets = np.empty(data.val_tokens, dtype=np.int32)
        data.train_shards.read(0, train)
        data.val_shards.read(1, targets)
        counts = np.bincount(train, minlength=pl_module.vocab_size) + 1.0
        nats = -np.log(counts / counts.sum())[targets].sum()
        self.metrics = {"val/unigram_loss": float(nats / len(targets))}
        lengths = data.byte_lengths
        if lengths is not None:
            self.metrics["val/unigram_bpb"] = float(nats / math.log(2) / lengths[targets].sum())
        for logger in trainer.loggers:
            logger.log_metrics(self.metrics, trainer.global_step)
