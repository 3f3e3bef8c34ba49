"""What a model's logits may depend on: the past, all of it, and nothing else.

Each function takes a `Subject`, returns what it measured, and raises AssertionError where a promise is broken.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from blagpt_pl.testing.promises import (
    CLOSE,
    EXACT,
    TOLERANCE,
    check_alone,
    check_causal,
    check_prefix,
    check_responsive,
    influence,
    noisy,
)
from blagpt_pl.testing.subject import Subject

LONG = 1024  # tokens, where a model is examined at its full size


class NotHere(Exception):
    """A promise that cannot be examined on this model; the message says why."""


def two_sequences(subject: Subject, length: int) -> tuple[Tensor, Tensor]:
    """(T,) each, different everywhere."""
    one, other = subject.tokens(2, length)
    return one, torch.where(one == other, (one + 1) % subject.model.vocab_size, other)


def runs(subject: Subject) -> str:
    """The model runs at every length, and the same input gives the same finite logits, in train mode from the same seed."""
    for length in subject.lengths:
        for training in (True, False):
            where = f"in {'train' if training else 'eval'} mode, {length} tokens"
            tokens, run = subject.tokens(2, length), subject.still(subject.moved.train(training))
            given, logits, states = tokens.clone(), [], []
            for seed in (2, 2, 3):
                torch.manual_seed(seed)
                with torch.set_grad_enabled(training):
                    logits.append(run(tokens).detach())
                states.append(torch.get_rng_state())
            shape = (2, length, subject.model.vocab_size)
            assert logits[0].shape == shape, f"{where}: logits {tuple(logits[0].shape)} (expected {shape})"
            odd = (~logits[0].isfinite()).any(-1).any(0).nonzero().flatten().tolist()
            assert not odd, f"{where}: logits {odd[0]} are not finite"
            assert torch.equal(tokens, given), f"{where}: the tokens are written into"
            same = logits[1] if training else logits[2]  # in evaluation the seed does not matter
            gap = (same - logits[0]).abs().max()
            assert gap == 0, (
                f"{where}: the same input gives logits that differ by {gap:.1e}: state that is no buffer, or randomness "
                f"{'that the seed does not set' if training else 'in evaluation'}"
            )
            assert not torch.equal(states[0], states[2]), (
                f"{where}: forward sets the global seed, so all that is drawn later repeats"
            )
    return f"at {', '.join(map(str, subject.lengths))} tokens, twice the same to the bit"


def causality(subject: Subject) -> str:
    """Change each token in turn: no earlier logit moves; in train and in eval mode, in float64, and in bfloat16."""
    worst = 0.0
    for length in subject.lengths:
        for training in (True, False):
            what = f"{subject.name} in {'train' if training else 'eval'} mode, {length} tokens"
            one, other = two_sequences(subject, length)
            reach = influence(subject.still(subject.exact.train(training)), one, other, training)  # (T, T)
            check_causal(reach, what)
            worst = max(worst, reach.tril(-1).max().item())
            if length == subject.length:
                with torch.autocast(one.device.type, torch.bfloat16):
                    reach = influence(subject.still(subject.moved.train(training)), one, other, training)
                check_causal(reach, f"{what}, bfloat16")
    return f"earlier logits move by {worst:.0e}, {', '.join(map(str, subject.lengths))} tokens"


def gradient_causality(subject: Subject) -> str:
    """No gradient flows to the embedding of a later token, from any logit or from the objective of any target.

    Raises:
        NotHere: no embedding reads the tokens.
    """
    length = min(subject.lengths[-1], subject.model.vocab_size // 2 - 1)
    if length < 2:
        raise NotHere(f"a vocabulary of {subject.model.vocab_size} is too small to tell places by their tokens")
    ids = length + torch.randperm(subject.model.vocab_size - length)  # distinct, and none of 0 ... T - 1
    ids = ids[: length + 1].to(next(subject.model.parameters()).device)
    worst = 0.0
    for training in (True, False):
        model = subject.exact.train(training)
        mode = f"{subject.name} in {'train' if training else 'eval'} mode"
        for what, flow in (
            ("logits", gradients_of_logits(model, ids[:-1])),
            (
                "the objective of targets up to",
                gradients_of_objective(model, ids, range(0, length, max(1, length // 8))),
            ),
        ):
            if not flow.any():
                raise NotHere("no nn.Embedding reads the tokens")
            leak = flow.triu(1) / flow.max()
            s, t = divmod(int(leak.argmax()), flow.shape[1])
            assert leak.max() <= EXACT, (
                f"{mode}: {what} {s} have a gradient by token {t}, of {leak.max():.1e} of the largest"
            )
            worst = max(worst, leak.max().item())
    return f"{worst:.0e} of the largest flows to later tokens"


def gradients_of_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """(T, T): at [s, t], the largest gradient of the logits s by the embedding of token t; tokens (T,), all distinct."""
    with captured_embeddings(model) as captured:
        torch.manual_seed(2)
        logits = model(tokens[None])[0]  # (T, V)
    weights = torch.randn_like(logits)  # a plain sum can cancel
    return torch.stack([sizes_of((row * w).sum(), captured, tokens) for row, w in zip(logits, weights, strict=True)])


def gradients_of_objective(model: nn.Module, tokens: Tensor, places: Iterable[int]) -> Tensor:
    """(T, T + 1): at [s, t], the largest gradient by the embedding of token t, of the objective whose last target that
    counts is token s + 1; tokens (T + 1,), all distinct.

    Rows of other places than those named are 0, and those where some part of the objective has no target left.
    """
    flow = torch.zeros(len(tokens) - 1, len(tokens), device=tokens.device, dtype=torch.float64)
    for s in places:
        targets = tokens[None, 1:].clone()
        targets[0, s + 1 :] = -100  # torch's ignore_index
        with captured_embeddings(model) as captured:
            torch.manual_seed(2)
            total, _ = model.objective(tokens[None, :-1], targets)
        if total.isfinite():
            flow[s] = sizes_of(total, captured, tokens)
    return flow


def sizes_of(value: Tensor, captured: list[tuple[Tensor, Tensor]], tokens: Tensor) -> Tensor:
    """(T,): the largest gradient of a value by what was looked up for each token.

    A place is told by its token, whatever the shape in which a model looks tokens up (patches, shifted rows).
    """
    found = torch.zeros(len(tokens), device=tokens.device, dtype=value.dtype)
    leaves = [leaf for _, leaf in captured]
    grads = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) if leaves else ()
    for (ids, _), grad in zip(captured, grads, strict=True):
        if grad is not None:
            size = grad.abs().amax(-1).expand(ids.shape).flatten()  # of one shape with the ids
            here = ids.flatten() == tokens[:, None]  # (T, ids)
            found = torch.maximum(found, torch.where(here, size, 0).amax(1))
    return found


@contextmanager
def captured_embeddings(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While it lasts, what every nn.Embedding looks up becomes a leaf: (ids, output), in the order of the calls."""
    captured: list[tuple[Tensor, Tensor]] = []

    def cut(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        captured.append((args[0], leaf))
        return leaf.clone()

    hooks = [m.register_forward_hook(cut) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


def responsiveness(subject: Subject) -> str:
    """Change each token in turn, the first one too: its own logits move, so that nothing was shifted once too often."""
    reach = influence(subject.moved.eval(), *two_sequences(subject, subject.length))
    check_responsive(reach, subject.name)
    own = reach.diagonal()
    late = (own <= TOLERANCE).nonzero().flatten().tolist()
    assert not late, (
        f"{subject.name}: logits {late[0]}, which predict token {late[0] + 1}, do not move with token {late[0]}"
    )
    return f"every token moves its own logits, by {own.min():.0e} at least"


def long_memory(subject: Subject) -> str:
    """Every token moves later logits, and the first one still some of the sequence's last quarter."""
    length = subject.lengths[-1]
    reach = influence(subject.moved.eval(), *two_sequences(subject, length))  # (T, T)
    lost = (reach.triu(1).amax(1)[:-1] <= TOLERANCE).nonzero().flatten().tolist()
    assert not lost, f"{subject.name}: no logits after {lost[0]} move with token {lost[0]}"
    farthest = int((reach[0] > TOLERANCE).nonzero().max())
    late, layers = length - max(1, length // 4), sum(1 for _ in subject.model.regions())
    assert farthest >= late, (
        f"{subject.name}: token 0 moves no logits after {farthest}, of {length} and with {layers} layers; "
        'where that is meant, the part says so: self.exempt = {"long memory": reason}'
    )
    return f"token 0 moves logits {farthest}, of 0 to {length - 1}, by {reach[0, farthest]:.0e}"


@torch.no_grad()
def batch(subject: Subject) -> str:
    """A sequence's logits depend neither on its companions in the batch nor on their order."""
    inputs, run = subject.tokens(3, subject.length), subject.moved.eval()
    check_alone(run, inputs, subject.name)
    order = torch.tensor([2, 0, 1], device=inputs.device)
    gap = (run(inputs[order]) - run(inputs)[order]).abs().max()
    assert gap <= CLOSE, f"{subject.name}: logits differ by {gap:.1e} when the sequences of a batch change places"
    return f"alone or among others, in any order: differs by {gap:.0e}"


def prefix(subject: Subject) -> str:
    """The first logits are the same when nothing follows."""
    length = min(subject.model.context, LONG)
    edges = {edge + more for edge in (16, 32, 64, 128, 256, 512) for more in (0, 1) if edge + more < length}
    check_prefix(subject.exact.eval(), subject.tokens(2, length), subject.name, edges)
    return f"{5 + len(edges)} prefixes of {length} tokens"


@torch.no_grad()
def no_memory(subject: Subject) -> str:
    """What was run before, shorter or longer, changes nothing: no mask, table or state outlives a batch."""
    inputs = subject.tokens(2, subject.lengths[-1])
    short = max(1, subject.lengths[-1] // 3)
    torch.manual_seed(4)
    first = noisy(subject.model).eval()(inputs)
    torch.manual_seed(4)  # the same noise
    other = noisy(subject.model).eval()
    start = other(inputs[:, :short])
    for what, logits, expected in (
        ("after a shorter batch", other(inputs), first),
        ("after a longer batch", other(inputs[:, :short]), start),
    ):
        gap = (logits - expected).abs().max()
        assert gap <= CLOSE, f"{subject.name}: logits differ by {gap:.1e} {what}; something outlives a batch"
    return f"the same after {short} and after {inputs.shape[1]} tokens"
