"""Compiled, a run of 200 steps with validation is a few graphs without a break, and the numbers it has uncompiled."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from helpers import Graphs, batch, block, shake, tiny

from blagpt_pl.callbacks.first_step import FirstStep
from blagpt_pl.data.module import TokenData
from blagpt_pl.data.shards import write_shard
from blagpt_pl.data.sources import ShardFiles
from blagpt_pl.data.tokenizers import ByteTokenizer
from blagpt_pl.errors import ConfigError
from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.memory import RecomputeBlocks
from blagpt_pl.optim.schedule import Trapezoid

STEPS, CONTEXT = 200, 16
GRAPHS = {False: 4, True: 2}  # by whole_graph: blocks and loss, or all; each once to train and once to measure


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TokenData]:
    folder, rng = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name in ("train", "val"):
        write_shard(folder / f"{name}.bin", rng.integers(0, 61, 2000), 257)
    source = ShardFiles([str(folder / "train.bin")], [str(folder / "val.bin")], ByteTokenizer())
    return lambda: TokenData(source, CONTEXT, batch_size=4, device_batch_size=2, val_tokens=101)


def fit(data: TokenData, folder: Path, steps: int = STEPS, **changes: object) -> tuple[BlaGPT, FirstStep]:
    torch.manual_seed(3)
    model = tiny(vocab_size=257, context=CONTEXT, schedule=lambda steps: Trapezoid(steps, 1, 1), **changes)
    first = FirstStep()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, val_check_interval=50, check_val_every_n_epoch=None,
        num_sanity_val_steps=0, logger=False, callbacks=[first], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    return model, first


@pytest.mark.parametrize("whole", GRAPHS)
def test_two_hundred_steps_with_validation(whole: bool, data: Callable, tmp_path: Path) -> None:
    backend = Graphs()
    model, first = fit(data(), tmp_path, compile=backend, whole_graph=whole, n_layers=3)
    assert len(backend.seen) == GRAPHS[whole]
    assert not torch._dynamo.utils.counters["graph_break"]
    assert first.summary()["graphs"] == GRAPHS[whole]
    assert first.summary()["first_step_s"] > 0
    eager, _ = fit(data(), tmp_path, n_layers=3)
    assert list(model.state_dict()) == list(eager.state_dict())  # no prefix in a checkpoint
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert (mine - theirs).abs().max() < 1e-4  # 200 steps of Adam


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"losses": [partial(ZLoss, weight=0.1)], "head": partial(LinearHead, bias=True, softcap=5.0)},
        {"token_bias": True, "loss": "full"},
        {"memory": RecomputeBlocks(), "block": partial(block(), dropout=0.1)},
    ],
    ids=["as it is", "terms and caps", "full", "recomputed"],
)
def test_one_graph_of_the_objective_is_the_eager_one(changes: dict) -> None:
    seen = Graphs()
    eager, whole = (shake(tiny(**changes, **how)) for how in ({}, {"compile": seen, "whole_graph": True}))
    whole.load_state_dict(eager.state_dict())
    found = []
    for model in (eager, whole):
        model.configure_model()
        torch.manual_seed(1)
        total, parts = model.objective(*batch(model))
        gradients = torch.autograd.grad(total, list(model.parameters()))
        with torch.inference_mode():
            nats = model.eval().measure(*batch(model))
        found.append([total, *parts.values(), *gradients, nats])
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-6
    assert len(seen.seen) == 2


def test_the_whole_graph_without_compilation_is_refused() -> None:
    with pytest.raises(ValueError, match="model.whole_graph: no effect without model.compile"):
        tiny(whole_graph=True)


def test_what_cannot_be_one_graph_is_refused() -> None:
    class Own(LinearHead):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(features)

    for changes, name in (
        ({"losses": [partial(MultiToken, n=2)]}, "the term multi_token"),
        ({"head": Own}, "the head Own"),
    ):
        model = tiny(compile="aot_eager", whole_graph=True, **changes)
        with pytest.raises(ConfigError, match=f"model.whole_graph: true, but {name} cannot be traced"):
            model.configure_model()


def test_uncompiled_a_first_step_has_no_graphs(data: Callable, tmp_path: Path) -> None:
    _, first = fit(data(), tmp_path, steps=3)
    assert set(first.summary()) == {"first_step_s"}
