"""Every configuration that is shipped: it parses, layers, and is the model that it says it is."""

import pytest
import torch
import yaml
from shipped import CONFIGS, built

from blagpt_pl.lab.train import run
from blagpt_pl.nn.base import count

COMPLETE = sorted(p.name for p in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("blagpt.yaml", 142_570_752), ("best.yaml", 142_570_752), ("gpt2.yaml", 124_475_904)],
)
def test_the_size_is_what_the_file_says(name: str, parameters: int) -> None:
    assert count(built(name).model.parameters()) == parameters


def test_the_baseline_is_the_original_field_for_field() -> None:
    cli = built("blagpt.yaml")
    block = cli.model.blocks[0]
    heads = block.attention.part.heads
    assert (heads.n, heads.n_kv, heads.dim, len(cli.model.blocks), cli.model.context) == (12, 4, 64, 12, 1024)
    assert [type(edit).__name__ for edit in block.attention.part.edits] == ["QKNorm", "RoPE"]
    assert block.attention.part.edits[1].theta == 10000.0
    assert cli.model.head.weight is cli.model.embedding.weight
    assert all(linear.bias is not None for linear in cli.model.modules() if isinstance(linear, torch.nn.Linear))
    data = cli.datamodule
    assert (data.batch_size, data.context, data.val_tokens, len(data.source.train_files())) == (
        512,
        1024,
        10_485_760,
        103,
    )
    factors = [cli.model.configure_schedule(cli.trainer).factor(s) for s in (0, 124, 249, 250, 3099, 3100, 4100, 5099)]
    assert factors == pytest.approx([1 / 250, 0.5, 1, 1, 1, 1, 0.5, 1 / 2000])


def test_tokenformer_has_the_size_of_the_original() -> None:
    model = built("blagpt.yaml", "--config", str(CONFIGS / "models" / "tokenformer.yaml")).model
    tokens = 12 * 5 * 2 * 4096 * 128  # blocks hold nothing else
    assert count(model.blocks.parameters()) == tokens
    assert count(model.parameters()) == 50304 * 128 + tokens + 2 * 128 == 69_353_728
    assert model.head.weight is model.embedding.weight


def test_best_differs_from_the_baseline_in_the_learning_rate_alone() -> None:
    ours, theirs = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("blagpt.yaml", "best.yaml"))
    rates = [c["model"]["init_args"]["optimizer"]["init_args"].pop("lr") for c in (ours, theirs)]
    assert rates == [1e-3, 1.8e-3]
    assert [c.pop("name") for c in (ours, theirs)] == ["blagpt", "best"]
    assert ours == theirs


@pytest.mark.parametrize("base", COMPLETE)
@pytest.mark.parametrize("overlay", sorted(p.name for p in (CONFIGS / "trainer").glob("*.yaml")))
def test_every_overlay_parses_on_every_base_without_a_gpu(
    base: str, overlay: str, capsys: pytest.CaptureFixture
) -> None:
    words = ["--config", str(CONFIGS / base), "--config", str(CONFIGS / "trainer" / overlay), "--print_config"]
    with pytest.raises(SystemExit) as done:
        run("fit", words)
    assert not done.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["accelerator"] == ("auto" if overlay == "trace.yaml" else "gpu")  # it is on top of these
    assert printed["trainer"]["max_steps"] == yaml.safe_load((CONFIGS / base).read_text())["trainer"]["max_steps"]
