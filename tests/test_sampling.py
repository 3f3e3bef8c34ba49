"""Sampling: what is chosen, from what, and what is refused."""

import pytest
import torch
from helpers import T, V, batch, shake, tiny, tiny_gpt2
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import Carry
from blagpt_pl.nn.states import States
from blagpt_pl.sampling import choose, following, sample

P = torch.tensor([0.05, 0.40, 0.10, 0.30, 0.15])


def chosen(logits: Tensor, n: int = 4000, **changes: object) -> Tensor:
    """Frequencies of the tokens over many draws."""
    arguments = {
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "generator": torch.Generator().manual_seed(0),
        **changes,
    }
    drawn = choose(logits.expand(n, -1), **arguments)
    assert drawn.shape == (n, 1)
    return drawn[:, 0].bincount(minlength=len(logits)) / n


def close(frequencies: Tensor, expected: Tensor) -> bool:
    return bool(((frequencies - expected).abs() < 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all())


def test_temperature_1_draws_from_the_softmax() -> None:
    assert close(chosen(P.log()), P)
    assert close(chosen(P.log() + 7), P)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_a_power_of_the_probabilities(temperature: float) -> None:
    expected = P ** (1 / temperature)
    assert close(chosen(P.log(), temperature=temperature), expected / expected.sum())


def test_temperature_0_is_the_likeliest() -> None:
    assert chosen(P.log(), temperature=0)[1] == 1
    assert chosen(P.log(), temperature=0, top_k=3, top_p=0.5)[1] == 1
    assert chosen(P.log(), temperature=1e-6)[1] == 1


@pytest.mark.parametrize(("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, range(5)), (99, range(5))])
def test_top_k(top_k: int, kept: list[int]) -> None:
    expected = torch.zeros(5)
    expected[list(kept)] = P[list(kept)]
    assert close(chosen(P.log(), top_k=top_k), expected / expected.sum())


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 4]), (1.0, range(5))]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(5)
    expected[list(kept)] = P[list(kept)]
    assert close(chosen(P.log(), top_p=top_p), expected / expected.sum())


def test_top_p_counts_after_temperature_and_top_k() -> None:
    frequencies = chosen(P.log(), top_k=2, top_p=0.55)  # 0.40 / 0.70 = 0.57 suffices
    assert frequencies[1] == 1
    assert chosen(P.log(), temperature=0.1, top_p=0.9)[1] == 1


def test_top_k_keeps_no_more_than_k_of_equals() -> None:
    frequencies = chosen(torch.zeros(5), top_k=2)
    assert (frequencies > 0).sum() == 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0.01, 1.0), st.floats(0.1, 3.0))
def test_nothing_outside_is_ever_drawn(seed: int, top_k: int, top_p: float, temperature: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)) * 3
    drawn = chosen(logits, 200, temperature=temperature, top_k=top_k, top_p=top_p).nonzero()[:, 0]
    p = (logits.double() / temperature).softmax(-1)
    ranked = p.sort(descending=True).values[:top_k]
    ranked = ranked / ranked.sum()
    size = int((ranked.cumsum(0) - ranked < top_p - 1e-5).sum()), int((ranked.cumsum(0) - ranked < top_p + 1e-5).sum())
    rank = p.argsort(descending=True).argsort()
    assert 1 <= size[0] <= size[1] <= top_k
    assert rank[drawn].max() < size[1]


def test_bf16_logits_are_chosen_from_in_float32() -> None:
    logits = torch.zeros(V * 100).bfloat16()
    assert (chosen(logits, 300, top_p=0.5) > 0).sum() > V  # a bfloat16 running sum would stall


# ---------------------------------------------------------------------- whole sequences


def test_the_prompt_comes_first_and_the_shape_fits(model: torch.nn.Module) -> None:
    prompt, _ = batch(model, 3, 5)
    out = sample(model, prompt, 7)
    assert out.shape == (3, 12)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :5], prompt)
    assert ((out >= 0) & (out < V)).all()
    assert torch.equal(sample(model, prompt, 0), prompt)


def test_greedy_is_teacher_forced_argmax(model: torch.nn.Module) -> None:
    prompt, _ = batch(model, 3, 5)
    out = model.generate(prompt, 10, temperature=0)
    for t in range(5, 15):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))


def test_only_the_last_context_is_read(model: torch.nn.Module) -> None:
    prompt, _ = batch(model, 2, T + 9)
    out = sample(model, prompt, 5, temperature=0)
    assert out.shape == (2, T + 14)
    assert torch.equal(out[:, 9:], sample(model, prompt[:, 9:], 5, temperature=0))
    for t in range(T + 9, T + 14):
        assert torch.equal(out[:, t], model(out[:, t - T : t])[:, -1].argmax(-1))


def test_a_seed_decides(model: torch.nn.Module) -> None:
    prompt, _ = batch(model, 2, 5)

    def out(seed: int) -> Tensor:
        return sample(model, prompt, 12, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(out(1), out(1))
    assert not torch.equal(out(1), out(2))
    assert torch.equal(torch.get_rng_state(), state)  # torch's own generator is left alone
    torch.manual_seed(5)
    mine = sample(model, prompt, 12)
    torch.manual_seed(5)
    assert torch.equal(mine, sample(model, prompt, 12))


def test_it_reads_in_eval_mode_and_returns_to_train() -> None:
    model = shake(tiny(dropout=0.5)).train()
    prompt, _ = batch(model, 2, 5)
    first = sample(model, prompt, 10, temperature=0)
    assert model.training
    assert torch.equal(first, sample(model, prompt, 10, temperature=0))  # no dropout
    assert torch.equal(first, sample(model.eval(), prompt, 10, temperature=0))
    assert not model.training
    assert not sample(model, prompt, 1).requires_grad


def test_it_returns_to_train_after_an_error() -> None:
    model = tiny().train()
    with pytest.raises(IndexError):
        sample(model, torch.full((1, 3), V), 1)
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": -1}, r"max_new_tokens: -1 \(expected 0 or more\)"),
        ({"temperature": -0.1}, r"temperature: -0.1 \(expected"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, r"top_k: 0 \(expected 1 or more\)"),
        ({"top_p": 0.0}, r"top_p: 0.0 \(expected more than 0"),
        ({"top_p": 1.1}, "top_p: 1.1"),
        ({"top_p": float("nan")}, "top_p: nan"),
        ({"tokens": torch.zeros(2, 0, dtype=torch.int64)}, r"tokens: shape \(2, 0\)"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: shape \(3,\)"),
    ],
)
def test_a_mistake_is_told(model: torch.nn.Module, changes: dict, message: str) -> None:
    arguments = {"tokens": torch.zeros(1, 3, dtype=torch.int64), "max_new_tokens": 2, **changes}
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)


# ---------------------------------------------------------------------- piece by piece


class Anew(torch.nn.Module):
    """A model that remembers nothing, to compare with one that does."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.context = model, model.context

    def can_continue(self) -> bool:
        return False

    def next_logits(self, tokens: Tensor) -> Tensor:
        return self.model.next_logits(tokens)


@pytest.mark.parametrize("given", [1, 5, T - 2, T, T + 3])
def test_what_is_remembered_changes_nothing(given: int) -> None:
    """Within the context, at its end, and beyond it, where keys and values of old positions are of no use any more."""
    model = shake(tiny()).double().eval()
    assert model.can_continue()
    tokens = torch.randint(V, (2, given))
    one, other = (
        sample(m, tokens, 7, temperature=0.7, generator=torch.Generator().manual_seed(3)) for m in (model, Anew(model))
    )
    assert torch.equal(one, other)


def test_a_token_costs_a_token() -> None:
    model, seen = shake(tiny()).eval(), []
    model.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    model.generate(torch.zeros(1, 5, dtype=torch.int64), T - 3)
    assert seen == [5, *[1] * (T - 5), T]


@torch.no_grad()
@pytest.mark.parametrize("given", [T - 1, T, T + 1, 2 * T + 3])
def test_what_follows_is_that_of_the_last_context(given: int) -> None:
    model = shake(tiny(), 0.2).double().eval()
    tokens, states = torch.randint(V, (2, given)), States()
    for _ in range(3):
        logits, states = following(model, tokens, states)
        assert (logits - model(tokens[:, -T:])[:, -1]).abs().max() < 1e-10
        assert (states is None) == (tokens.shape[1] > T)
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)


class OtherTrunk(BlaGPT):
    def trunk(self, tokens: Tensor) -> tuple[Tensor, Carry]:
        return super().trunk(tokens)


class OtherFeatures(BlaGPT):
    def features(self, tokens: Tensor) -> Tensor:
        return super().features(tokens)


def test_who_remembers_a_part_of_it_only_does_not_continue() -> None:
    assert tiny().can_continue()
    assert not tiny_gpt2().can_continue()  # learned positions
    for cls in (OtherTrunk, OtherFeatures):
        model = tiny()
        model.__class__ = cls
        assert not model.can_continue()
