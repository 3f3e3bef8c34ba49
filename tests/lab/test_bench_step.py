"""`blagpt bench step`, and what makes a step: the work is that of a plain loop, the rows are complete. No time is asserted."""

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import bench_step, stepper
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.nn.base import count
from tests.helpers import tiny

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CPU = torch.device("cpu")
SMALL = ["--model.d_model", "32", "--model.n_layers", "2", "--data.context", "32"]


def measured(module: object, words: list[str], options: str, device: torch.device = CPU) -> object:
    """What a benchmark finds, without its command."""
    p = argparse.ArgumentParser()
    module.options(p)
    args = p.parse_args(options.split())
    args.layers, args.size, args.repeats, args.warmup = words, "small", 3, 0
    return module.measure(args, device)


def test_rows_say_what_was_trained_and_the_ratios_are_those_of_medians() -> None:
    base = str(CONFIGS / "quickstart.yaml")
    other = f"{base}+{CONFIGS / 'techniques' / 'relu2.yaml'}"
    report = measured(bench_step, [base, other, *SMALL], "--device-batch-size 2")
    first, second = report.rows
    assert [row["name"] for row in report.rows] == ["quickstart", "quickstart+relu2"]
    assert first["parameters"] == count(model_of(layers_for(["--config", base, *SMALL])).parameters())
    for row in report.rows:
        assert (row["tokens"], row["size"]) == (64, "2 x 32")
        assert (row["compile"], row["precision"], row["mfu"]) == ("eager", "32-true", None)
        assert row["median_ms"] == statistics.median(row["times_ms"])
        assert len(row["times_ms"]) == 3
        assert row["tokens_per_s"] == pytest.approx(64e3 / row["median_ms"])
        assert row["tflops"] == pytest.approx(row["flops_per_token"] * row["tokens_per_s"] / 1e12)
        assert row["peak_mib"] > 3 * 4 * row["parameters"] / 2**20  # weights and Adam's two moments at least
        assert row["first_s"] > 0
    assert (first["ratio"], second["ratio"]) == (1, second["median_ms"] / first["median_ms"])
    assert report.table().count("\n") == 3


def test_compilation_and_precision_are_what_the_options_say() -> None:
    words = ["--config", str(CONFIGS / "quickstart.yaml"), *SMALL]
    report = measured(bench_step, words, "--device-batch-size 2 --compile eager --precision bf16-mixed")
    assert [(r["compile"], r["precision"]) for r in report.rows] == [("eager", "bf16-mixed")]


@pytest.mark.gpu
def test_on_a_gpu_the_table_has_the_work_and_the_memory() -> None:
    words = ["--config", str(CONFIGS / "best.yaml")]
    (row,) = measured(bench_step, words, "--precision bf16-mixed", torch.device("cuda")).rows
    assert (row["compile"], row["precision"]) == ("inductor", "bf16-mixed")
    assert row["mfu"] is None or 0 < row["mfu"] < 1
    assert 3 * 4 * row["parameters"] / 2**20 < row["peak_mib"] < 1000


def test_a_step_is_a_plain_loops() -> None:
    ours, theirs = (tiny(), tiny())
    theirs.load_state_dict(ours.state_dict())
    tokens, targets = stepper.random_batch(ours.vocab_size, 2, ours.context, CPU)
    step = stepper.training_step(lambda: ours.objective(tokens, targets)[0], ours.make_optimizer(), nullcontext)
    optimizer, losses = theirs.make_optimizer(), []
    for _ in range(3):
        loss = theirs.objective(tokens, targets)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert step().item() == losses[-1]
    assert losses[0] > losses[-1]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_targets_are_the_next_tokens() -> None:
    tokens, targets = stepper.random_batch(61, 3, 16, CPU)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert torch.equal(tokens, stepper.random_batch(61, 3, 16, CPU)[0])


def test_what_stays_in_memory_counts_a_shared_tensor_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(256, 256, bias=False), "b": nn.Linear(256, 256, bias=False)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert stepper.state_mib(model, optimizer) == 0.25
    model["a"](torch.ones(1, 256)).sum().backward()
    optimizer.step()
    assert 0.75 <= stepper.state_mib(model, optimizer) < 0.7501


@pytest.mark.parametrize(
    "overlay", [None, *sorted((CONFIGS / "techniques").glob("*.yaml"))], ids=lambda p: p and p.stem
)
def test_every_technique_has_a_small_model(overlay: Path | None) -> None:
    base = CONFIGS / "blagpt.yaml"
    words = ["--config", str(base)] + ([] if overlay is None else ["--config", str(overlay)])
    try:
        layers = layers_for(words)
    except ConfigError as error:  # an overlay over what another one made
        pytest.skip(str(error))
    with torch.device("meta"):
        model = model_of(layers, stepper.small(layers.tree))
    assert (model.embedding.weight.shape, len(model.blocks)) == ((8192, 192), 4)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.5])
def test_another_size_goes_with_the_heads(factor: float) -> None:
    layers = layers_for(["--config", str(CONFIGS / "best.yaml")])
    tree = stepper.of_size(layers.tree, factor, factor)
    with torch.device("meta"):
        model = model_of(layers, tree)
    assert (model.embedding.weight.shape[1], len(model.blocks)) == (768 * factor, 12 * factor)
    heads = model.blocks[0].attention.part.heads
    assert (heads.n, heads.n_kv, heads.dim) == (12, 4, 64 * factor)
    assert (tree == layers.tree) == (factor == 1)


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["{0}", "{0}"], "", "named twice"),
        ([], "", "no configuration is named"),
        (["{0}"], "--device-batch-size 0", "--device-batch-size: 0 .expected 1 or more"),
        (["{0}"], "--precision 16-mixed", "precision: 16-mixed scales the loss"),
    ],
)
def test_mistakes_are_told(words: list[str], options: str, message: str) -> None:
    words = [word.format(CONFIGS / "quickstart.yaml") for word in words]
    with pytest.raises(ConfigError, match=message):
        measured(bench_step, words, options)
