"""The promises of a whole model: those of a part, and start, learning, state, ties, roles, objective and generation."""

import copy
import io
import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.testing.promises import (
    CLOSE,
    LENGTHS,
    check_alone,
    check_causal,
    check_gradients,
    check_prefix,
    check_responsive,
    influence,
    noisy,
)

ROLES = {"matrix", "embedding", "head", "vector"}  # as in `optim.roles`, which stands beside this module, not below it


def random_tokens(model: nn.Module, *shape: int) -> Tensor:
    """Uniform random tokens on the model's device."""
    return torch.randint(model.vocab_size, shape, device=next(model.parameters()).device)


def mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `forward`'s logits: what `objective` must agree with."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def train(model: nn.Module, steps: int, batch: Callable[[], Tensor]) -> list[float]:
    """Minimise the whole objective on batches (B, T + 1); the next-token loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        tokens = batch()
        optimizer.zero_grad()
        total, parts = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    return losses


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The sets of names under which one tensor is known."""
    names: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def check_objective(model: nn.Module, length: int) -> None:
    """The next-token part of the objective is the cross-entropy of `forward`: nothing shifts the targets a second time."""
    tokens, targets = random_tokens(model, 2, 3, length)
    targets[0, -2:] = -100  # torch's ignore_index
    for training in (True, False):
        model.train(training)
        losses = []
        for loss in (lambda: model.objective(tokens, targets)[1]["loss"], lambda: mean_loss(model, tokens, targets)):
            torch.manual_seed(3)  # the same dropout
            losses.append(loss().item())
        gap = abs(losses[0] - losses[1])
        assert gap <= CLOSE, f"objective: next-token loss {losses[0]:.6f}, but cross-entropy of forward {losses[1]:.6f}"
    nats = model.measure(tokens, targets).item() / (targets >= 0).sum().item()
    assert abs(nats - losses[1]) <= CLOSE, (
        f"measure: {nats:.6f} nats a token, but cross-entropy of forward {losses[1]:.6f}"
    )


def check_roles(model: nn.Module) -> None:
    """Every distinct parameter has exactly one role, and nothing else has one."""
    roles, names = model.parameter_roles(), {name for name, _ in model.named_parameters()}
    odd = sorted(names ^ roles.keys())
    assert not odd, f"parameter_roles: {odd[0]} {'has no role' if odd[0] in names else 'is no parameter'}"
    unknown = sorted(set(roles.values()) - ROLES)
    assert not unknown, f"parameter_roles: unknown role {unknown[0]!r} (expected one of {', '.join(sorted(ROLES))})"


@torch.no_grad()
def check_state(model: nn.Module, tokens: Tensor) -> None:
    """A checkpoint brings back every logit exactly, and tied tensors stay one."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = noisy(model)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(tokens), model(tokens)), "state_dict: logits differ after a round trip"
    assert ties(other) == ties(model), f"state_dict: tied tensors {ties(model)} became {ties(other)}"


@torch.no_grad()
def check_generate(model: nn.Module, length: int) -> None:
    """Greedy generation picks what `forward` ranks first, given the same prefix."""
    prompt = random_tokens(model, 2, length // 2)
    tokens = model.generate(prompt, length - length // 2, temperature=0)
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt), "generate: does not begin with the prompt"
    logits = model(tokens[:, :-1])[:, prompt.shape[1] - 1 :].float()  # (B, new, V)
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, prompt.shape[1] :, None])[..., 0]
    assert behind.max() <= CLOSE, f"generate: chose a token {behind.max():.1e} below the likeliest of forward"


def check_model(model: nn.Module, *, init_tolerance: float = 0.15, idle: Collection[str] = ()) -> None:
    """Check the promises of a language model; a few seconds for a small one, which is left as it was.

    Args:
        model: a `LanguageModel`, freshly built.
        init_tolerance: how far the first loss may lie from ln V.
        idle: names of parameters that rightly receive no gradient.
    """
    torch.manual_seed(0)
    what, uniform = type(model).__name__, math.log(model.vocab_size)
    lengths = sorted({min(n, model.context) for n in LENGTHS})
    tokens = random_tokens(model, 8, lengths[-1] + 1)
    inputs = tokens[:3, :-1]
    check_roles(model)
    fresh = copy.deepcopy(model).eval()
    first = mean_loss(fresh, tokens[:, :-1], tokens[:, 1:]).item()
    assert abs(first - uniform) <= init_tolerance, f"first loss {first:.3f}, but ln V = {uniform:.3f}"

    moved = noisy(model)
    check_objective(moved, lengths[-1])
    check_alone(moved, inputs, what)
    for length in lengths:
        for training in (True, False):
            one, other = random_tokens(model, 2, length)
            other = torch.where(one == other, (one + 1) % model.vocab_size, other)
            reach = influence(moved.train(training), one, other)  # (T, T)
            check_causal(reach, f"{what} in {'train' if training else 'eval'} mode")
    check_responsive(reach, what)
    check_prefix(moved, inputs, what)
    check_state(moved, inputs)
    check_generate(moved, lengths[-1])

    train(fresh, 4, lambda: tokens)
    check_gradients(fresh, idle, "after 4 steps")
    assert ties(fresh) == ties(model), f"training: tied tensors {ties(model)} became {ties(fresh)}"
    last = train(fresh, 150, lambda: tokens[:2])[-1]
    assert last < 0.1, f"overfitting: 2 sequences still have a loss of {last:.3f} after 150 steps"
    unforeseen = sum(train(copy.deepcopy(model).train(), 150, lambda: random_tokens(model, *tokens.shape))[-30:]) / 30
    assert unforeseen >= uniform - 0.05, (
        f"fresh random tokens: loss {unforeseen:.3f} below ln V = {uniform:.3f}: a leak"
    )
