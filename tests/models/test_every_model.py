"""What holds of every architecture in configs/models/, at the tiny size of `blagpt check`: graphs, techniques, text, FLOPs.

The overlays of configs/techniques/ that a model does not take stand in docs/models/README.md with their reason, and exactly those
are refused.
"""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Graphs
from overlaid import LENGTHS, TECHNIQUES, built, check_no_future, fingerprint, merged, parsed, train
from shipped import BASELINE, CONFIGS, MODELS
from shipped import built as built_whole
from torch import Tensor, nn

from blagpt_pl.data.shards import HEADER_BYTES
from blagpt_pl.data.tokenizers import GPT2Tokenizer
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.model_of import layers_for
from blagpt_pl.lab.tiny import tiny
from blagpt_pl.lm import LanguageModel
from blagpt_pl.nn.attention.attention import HeadPipeline
from blagpt_pl.nn.attention.cross import Cross
from blagpt_pl.nn.base import Carry, Heads, count
from blagpt_pl.nn.block import Branch
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.pooling import Pool
from blagpt_pl.nn.recurrent.parallel_heads import HymbaMixer
from blagpt_pl.nn.upsampling import Upsample
from blagpt_pl.optim.roles import OWN
from blagpt_pl.testing.subject import random_tokens

PAGE = CONFIGS.parent / "docs" / "models" / "README.md"


@cache
def excluded() -> dict[tuple[str, str], str]:
    """Pairs of a model and a technique that do not combine, and why: rows `| model | techniques | reason |`."""
    rows = re.findall(r"^\| (`[^|]*`) \| (`[^|]*`) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    return {
        (model, technique): reason
        for models, techniques, reason in rows
        for model in re.findall(r"`(\w+)`", models)
        for technique in re.findall(r"`(\w+)`", techniques)
    }


@cache
def plain(model: str) -> tuple:
    return fingerprint(built(merged(model=model)))


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("model", MODELS)
def test_every_technique_composes(model: str, technique: str) -> None:
    reason = excluded().get((model, technique))
    try:
        made = built(merged(technique, model=model))
    except ConfigError as error:
        assert reason is not None, f"{technique} on {model}: {error}; a reason belongs in docs/models/README.md"
        return
    assert reason is None, f"{technique} works on {model}, but docs/models/README.md says: {reason}"
    alike = merged(technique, model=model) == merged(model=model)  # tiny, where at full size they are not
    assert alike or fingerprint(made) != plain(model), f"{technique}.yaml changes nothing of {model}"
    train(made)
    check_no_future(made, LENGTHS[0], True, f"{model}+{technique}")


@pytest.mark.parametrize(
    "model", ["ftp", "hourglass", "hymba", "megabyte", "zamba2"]
)  # others: a block after the other
def test_trunk_and_loss_are_one_graph(model: str) -> None:
    """With `whole_graph` nothing breaks it, and it computes what the eager one does.

    The graphs run as they were traced; that AOT takes them is a promise of `blagpt check`, region by region.
    """
    torch._dynamo.reset()
    seen = Graphs("eager")
    eager, whole = (built(merged(model=model)) for _ in range(2))
    fingerprint(eager)  # moves every parameter off its start
    whole.load_state_dict(eager.state_dict())
    whole.whole_graph = True
    whole.compile_regions(seen)
    tokens = torch.randint(eager.vocab_size, (2, LENGTHS[1] + 1))
    found = []
    for one in (eager, whole):
        total, parts = one.train().objective(tokens[:, :-1], tokens[:, 1:])
        gradients = torch.autograd.grad(total, list(one.parameters()))
        with torch.inference_mode():
            nats = one.eval().measure(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        found.append([total, *parts.values(), *gradients, nats])
    torch._dynamo.reset()
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 2e-6
    assert len(seen.seen) == 2  # to train and to measure


WITHOUT_ATTENTION, HYBRIDS = ("mamba2", "rwkv7"), ("rene", "zamba2")


def heads_in(modules: Iterable[nn.Module]) -> list[Heads]:
    """Of every attention within a block, in the order of the model."""
    return [m.heads for module in modules for m in module.modules() if isinstance(m, HeadPipeline | HymbaMixer)]


@pytest.mark.parametrize("model", MODELS)
def test_blocks_are_regions_and_are_numbered(model: str) -> None:
    """What is not among the regions is neither compiled, nor sharded apart, nor recomputed, and nobody would notice."""
    made = built(merged(model=model))
    regions = list(made.regions())
    within = [id(p) for region in regions for p in {*region.parameters()}]
    assert len({*map(id, regions)}) == len(regions) and len({*within}) == len(within)
    for module in made.modules():
        if isinstance(module, Branch | Cross | Pool | Upsample):
            assert {id(p) for p in module.parameters()} <= {*within}, type(module)
    if model in WITHOUT_ATTENTION:
        return
    sites = [heads.site for heads in heads_in([made])]
    if model in HYBRIDS:  # whose other layers do not say where they stand
        assert [site.layer for site in sites] == sorted({site.layer for site in sites})
        assert sites[-1].layer < sites[-1].n_layers and len({site.n_layers for site in sites}) == 1
        return
    assert sorted(site.layer for site in sites) == list(range(len(sites)))
    assert {site.n_layers for site in sites} == {len(sites)}
    assert [heads.site.layer for heads in heads_in(regions)] == list(range(len(sites)))


@pytest.mark.parametrize("model", sorted(MODELS.keys() - {"ftp"}))  # which refuses it
def test_further_heads_are_built_where_the_last_block_stands(model: str) -> None:
    made = built(merged("multi_token", model=model))
    (term,) = made.losses
    if model not in (*WITHOUT_ATTENTION, *HYBRIDS):
        last = max(heads_in(made.regions()), key=lambda heads: heads.site.layer)
        assert heads_in(term.blocks) == [last] * len(term.blocks)
    like = [[p.shape for p in block.parameters()] for block in term.blocks]
    assert like and [like[0]] * len(like) == like
    assert like[0] in [[p.shape for p in region.parameters()] for region in made.regions()]


DROPPED = {"ftp": 2, "ftp_seed": 2, "megabyte": 2}  # streams that tokens enter, where there is more than one


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_told_how_it_entered_and_what_tokens_enter_is_dropped(model: str) -> None:
    tree = merged(model=model)
    tree["model"]["init_args"]["dropout"] = 0.25
    made = built(tree).train()
    entered: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, Carry]) -> None:
        x, carry = args
        if id(carry.x0) not in entered:
            assert x is carry.x0
            entered[id(carry.x0)] = x

    for region in made.regions():
        region.register_forward_pre_hook(note)
    tokens = random_tokens(made, 2, LENGTHS[1])
    made.objective(tokens, tokens)
    shares = [(x == 0).float().mean().item() for x in entered.values()]
    assert sum(0.15 < share < 0.6 for share in shares) == DROPPED.get(model, 1)


@pytest.mark.parametrize("model", MODELS)
def test_all_of_it_is_counted_and_its_page_says_so(model: str) -> None:
    """No operation without a rule; and the account of the full size is made without memory."""
    full = built_whole("blagpt.yaml", "--config", str(MODELS[model])).model
    flops = count_flops(full, full.context)
    assert not flops.uncounted
    assert flops.backward_per_token == pytest.approx(2 * flops.forward_per_token, rel=1e-3)
    assert 60e6 < count(full.parameters()) < 200e6
    parameters, costs = f"{count(full.parameters()):,}", f"{flops.per_token:,}"
    assert parameters in MODELS[model].read_text()
    pages = [page.read_text() for page in PAGE.parent.glob("*.md") if page != PAGE]
    (page,) = [text for text in pages if f"configs/models/{model}.yaml" in text.partition("## ")[0]]
    assert parameters in page and costs in page
    assert "```mermaid" in page
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith("| [") and f"| `{model}` |" in line]
    assert f"| {parameters} | {costs} |" in row


@pytest.fixture(scope="module")
def text(shards: Path) -> torch.Tensor:
    """Real text from the shards, character by character: ASCII from space to tilde as 0 ... 94, a new line 95, all else 96."""
    tokens = np.fromfile(shards / "shards" / "webtext_train_000004.bin", np.uint16, 50_000, offset=HEADER_BYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shards / "tiktoken-cache"))
        characters = np.frombuffer(GPT2Tokenizer().decode(tokens.tolist()).encode(), np.uint8).astype(np.int64)
    ids = np.where((characters >= 32) & (characters < 127), characters - 32, np.where(characters == 10, 95, 96))
    return torch.from_numpy(ids)


def drawn(text: Tensor, batch: int, size: int) -> tuple[Tensor, Tensor]:
    """Random windows of a text, and what follows each of their characters."""
    starts = torch.randint(len(text) - size - 1, (batch,))
    windows = torch.stack([text[i : i + size + 1] for i in starts])
    return windows[:, :-1], windows[:, 1:]


@pytest.mark.parametrize("model", MODELS)
def test_it_learns_real_text(model: str, text: torch.Tensor) -> None:
    """Its next-token loss falls well below that of the best prediction that looks at no character."""
    made: LanguageModel = parsed(merged(model=model))
    p = torch.bincount(text, minlength=made.vocab_size) / len(text)
    goal = -(p * p.clamp(min=1e-9).log()).sum().item() - 0.1  # nats; 0.1 below the unigram model
    optimizer = torch.optim.AdamW(made.train().parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    losses = [4.6]
    while sum(losses[-10:]) / min(10, len(losses)) > goal and len(losses) < 300:
        optimizer.zero_grad()
        total, parts = made.objective(*drawn(text, 8, 48))
        total.backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[1] > goal + 1
    assert sum(losses[-10:]) / min(10, len(losses)) <= goal, (
        f"{losses[-1]:.3f} nats after {len(losses)} steps, {goal:.3f} to be reached"
    )
    assert made.generate(text[None, :5], 9).shape == (1, 14)


@pytest.mark.parametrize("recipe", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["hymba", "mamba2", "rene", "rwkv7", "zamba2"])
def test_a_recurrence_learns_real_text_by_the_shipped_recipes(model: str, recipe: str, text: torch.Tensor) -> None:
    """With the groups and rates of a run: what drives a recurrence apart, without weight decay, never Muon's."""
    words = [BASELINE, MODELS[model], CONFIGS / "optim" / f"{recipe}.yaml"]
    made = parsed(tiny(layers_for([word for path in words for word in ("--config", str(path))]).tree)).train()
    optimizer = made.make_optimizer()
    groups = {group["role"]: group for group in optimizer.param_groups}
    driving = [p for role in OWN for p in groups.get(role, {"params": []})["params"]]
    assert driving and all(groups[role]["weight_decay"] == 0 for role in OWN if role in groups)
    if recipe == "muon":
        assert not {*map(id, driving)} & {id(p) for g in optimizer.members["matrix"].param_groups for p in g["params"]}
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        total, parts = made.objective(*drawn(text, 8, 48))
        total.backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5, losses
