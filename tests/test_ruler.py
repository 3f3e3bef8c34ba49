"""The one ruler."""

import math

import pytest
import torch
from helpers import batch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.text import Perplexity

from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.ruler import Ruler


def measured(*updates: tuple) -> dict[str, float]:
    ruler = Ruler()
    for nats, tokens, *n_bytes in updates:
        ruler.update(torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens), *map(torch.tensor, n_bytes))
    return ruler.compute()


def test_the_formulas() -> None:
    result = measured((30.0, 10, 44), (6.0, 2, 6))
    assert result == {
        "loss": pytest.approx(36 / 12),
        "perplexity": pytest.approx(math.exp(3)),
        "tokens": 12,
        "bpb": pytest.approx(36 / math.log(2) / 50),
    }


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_8() -> None:
    assert measured((1000 * math.log(256), 1000, 1000))["bpb"] == pytest.approx(8.0, abs=1e-12)


@pytest.mark.parametrize("updates", [[(3.0, 2)], [(3.0, 2, 9), (3.0, 2)], [(3.0, 2, 9), (3.0, 2, -1)], [(3.0, 2, 0)]])
def test_bpb_is_silent_unless_every_byte_is_known(updates: list) -> None:
    result = measured(*updates)
    assert "bpb" not in result
    assert result["loss"] == pytest.approx(1.5)


def test_a_batch_of_padding_weighs_nothing() -> None:
    assert measured((30.0, 10, 44), (0.0, 0, 0)) == measured((30.0, 10, 44))


def test_nothing_measured_is_told() -> None:
    with pytest.raises(ValueError, match="not a single target token; fix: data.val_tokens"):
        Ruler().compute()


def test_a_diverged_model_has_a_loss_not_an_overflow() -> None:
    assert measured((5000.0, 1))["loss"] == 5000
    assert math.isfinite(measured((5000.0, 1))["perplexity"])
    assert math.isnan(measured((math.nan, 1))["loss"])


def test_reset_forgets() -> None:
    ruler = Ruler()
    ruler.update(torch.tensor(9.0), torch.tensor(2), torch.tensor(-1))
    ruler.reset()
    ruler.update(torch.tensor(4.0), torch.tensor(2), torch.tensor(8))
    assert ruler.compute()["loss"] == 2
    assert "bpb" in ruler.compute()


def sums(model: torch.nn.Module, tokens: Tensor, targets: Tensor, sizes: list[int]) -> dict[str, float]:
    """The ruler over the sequences cut into batches of these sizes."""
    ruler = Ruler()
    for inputs, aims in zip(tokens.split(sizes), targets.split(sizes), strict=True):
        ruler.update(model.measure(inputs, aims), (aims != IGNORE).sum(), (aims != IGNORE).sum() * 4)
    return ruler.compute()


def test_perplexity_equals_torchmetrics(model: torch.nn.Module) -> None:
    tokens, targets = batch(model, 6)
    targets = targets.clone()
    targets[1, 5:] = IGNORE
    theirs = Perplexity(ignore_index=IGNORE)
    for part in (slice(0, 4), slice(4, 6)):
        theirs.update(model(tokens[part]).detach(), targets[part])
    ours = sums(model, tokens, targets, [4, 2])
    assert ours["perplexity"] == pytest.approx(theirs.compute().item(), rel=1e-5)
    assert ours["tokens"] == (targets != IGNORE).sum()


@settings(deadline=None, max_examples=15)
@given(st.permutations(range(6)), st.sampled_from([[6], [1] * 6, [4, 2], [1, 5], [2, 3, 1]]))
def test_neither_batches_nor_order_matter(order: list[int], sizes: list[int]) -> None:
    from helpers import shake, tiny

    torch.manual_seed(0)
    model = shake(tiny()).eval()
    tokens, targets = batch(model, 6)
    targets = targets.clone()
    targets[0, 1:] = IGNORE  # a mean of batch means would give this row's one token the weight of 23
    whole = sums(model, tokens, targets, [6])
    assert sums(model, tokens[order], targets[order], sizes)["loss"] == pytest.approx(whole["loss"], rel=1e-6)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10**6), st.integers(1, 10**7)), min_size=1, max_size=20))
def test_ranks_add_up(updates: list[tuple]) -> None:
    """Two rulers whose states are summed, as torchmetrics does over ranks, are the one that saw everything."""
    halves = [Ruler(), Ruler()]
    for i, (nats, tokens, n_bytes) in enumerate(updates):
        halves[i % 2].update(torch.tensor(nats, dtype=torch.float64), torch.tensor(tokens), torch.tensor(n_bytes))
    assert {r for h in halves for r in h._reductions.values()} == {torchmetrics_sum()}
    both = Ruler()
    both.sums, both.unmeasured = (sum(getattr(h, s) for h in halves) for s in ("sums", "unmeasured"))
    together, alone = both.compute(), measured(*updates)
    assert together.keys() == alone.keys()
    assert all(together[name] == pytest.approx(alone[name], rel=1e-12) for name in alone)


def torchmetrics_sum() -> object:
    from torchmetrics.utilities import dim_zero_sum

    return dim_zero_sum


def test_sums_stay_exact_over_many_batches() -> None:
    """10 million tokens at 3.3 nats: float32 sums would stop at 2**24 tokens and lose digits long before."""
    ruler = Ruler()
    for _ in range(2000):
        ruler.update(torch.tensor(3.3 * 10_001, dtype=torch.float64), torch.tensor(10_001))
    result = ruler.compute()
    assert result["tokens"] == 2000 * 10_001
    assert result["loss"] == pytest.approx(3.3, rel=1e-13)


def test_it_travels_with_the_model_but_not_in_its_checkpoint(model: torch.nn.Module) -> None:
    assert not any("ruler" in name for name in model.state_dict())
    assert not any("ruler" in name for name, _ in model.named_parameters())
    assert model.bfloat16().ruler.sums.dtype == torch.float64
