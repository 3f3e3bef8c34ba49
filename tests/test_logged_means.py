"""What is logged of a step with several micro-batches is their mean."""

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from helpers import tiny
from torch.utils.data import DataLoader

from blagpt_pl.lab.train import DEFAULTS
from blagpt_pl.losses.z_loss import ZLoss


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_logged_loss_is_the_mean_over_micro_batches(micro: int) -> None:
    torch.manual_seed(0)
    model = tiny(losses=[partial(ZLoss, weight=1e-2)])
    tokens = torch.randint(61, (micro, 2, 13), generator=torch.Generator().manual_seed(0))
    batch = tokens[..., :-1], tokens[..., 1:]
    with torch.no_grad():
        found = [model.objective(x, y)[1] for x, y in zip(*batch, strict=True)]
    wanted = {name: sum(float(parts[name]) for parts in found) / micro for name in found[0]}
    flags: dict[str, Any] = {**DEFAULTS, "log_every_n_steps": 1, "logger": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", devices=1, enable_progress_bar=False, **flags)
    trainer.fit(model, DataLoader([batch], batch_size=None))
    logged = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
    assert wanted.keys() == {"loss", "z_loss"}
    for name, value in wanted.items():
        assert logged[name] == pytest.approx(value, rel=1e-5)
