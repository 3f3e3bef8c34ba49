"""Promises of a part and of a model, checked by running them; for our tests, for `blagpt check`, and for strangers' parts.

How      every parameter is first moved by N(0, 0.03²), for a zero start hides leaks. Row t of a batch has its position t
         changed: two runs, seeded alike, tell how far output s moves with input t, for all t and s at once (`influence`).
Lengths  odd and prime, so that nothing hides behind a multiple of a chunk, patch or segment
Raises   AssertionError, saying which promise was broken and where
"""

import copy
import io
import math
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.nn.base import (
    Activation,
    Carry,
    ChannelMixer,
    Core,
    Head,
    HeadEdit,
    Heads,
    Norm,
    Positions,
    SequenceMixer,
    Site,
)  # fmt: skip

SITE = Site(d_model=32, n_layers=2, layer=0, vocab_size=61, context=32)
HEADS = Heads(SITE, n=4, n_kv=2, dim=8)
LENGTHS = (13, 23)
ROLES = {"matrix", "embedding", "head", "vector"}  # as in `optim.roles`, which stands beside this module, not below it
TOLERANCE = 1e-6  # what rounding may move; a leak moves more
CLOSE = 1e-5  # between two ways to compute the same

Run = Callable[[Tensor], Tensor]  # inputs (B, T, ...) -> outputs (..., B, T, width)


def noisy(module: nn.Module) -> nn.Module:
    """A copy whose parameters are all moved by N(0, 0.03²)."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.03)
    return module


@torch.no_grad()
def influence(run: Run, one: Tensor, other: Tensor) -> Tensor:
    """(..., T, T): at [t, s], how far output s moves when input t of `one` (T, ...) becomes that of `other`."""
    here = torch.eye(len(one), dtype=torch.bool, device=one.device).reshape(len(one), len(one), *[1] * (one.ndim - 1))
    outputs = []
    for rows in (one.expand(len(one), *one.shape), torch.where(here, other, one)):  # (T, T, ...)
        torch.manual_seed(2)  # the same dropout
        outputs.append(run(rows).float())
    return (outputs[1] - outputs[0]).abs().amax(-1)


def check_causal(moved: Tensor, what: str) -> None:
    """No output moves with a later input."""
    early = moved.tril(-1).reshape(-1, *moved.shape[-2:]).amax(0)
    t, s = divmod(int(early.argmax()), early.shape[-1])
    assert early.max() <= TOLERANCE, f"{what}: looks into the future: output {s} moves by {early.max():.1e} with input {t}"


def check_responsive(moved: Tensor, what: str) -> None:
    """Every input moves its own or a later output, the first one too."""
    deaf = (moved.triu().amax(-1) <= TOLERANCE).nonzero()[:, -1].tolist()
    assert not deaf, f"{what}: no output moves with input {deaf[0]}"


@torch.no_grad()
def check_alone(run: Run, inputs: Tensor, what: str) -> None:
    """A sequence's outputs depend neither on what was run before nor on its companions in the batch."""
    whole = run(inputs)  # (..., B, T, width)
    for i in range(len(inputs)):
        gap = (run(inputs[i : i + 1]) - whole[..., i : i + 1, :, :]).abs().max()
        assert gap <= CLOSE, f"{what}: sequence {i} of a batch differs by {gap:.1e} from the same sequence alone"
    assert torch.equal(run(inputs), whole), f"{what}: the same input gave two outputs; something outlives a batch"


@torch.no_grad()
def check_prefix(run: Run, inputs: Tensor, what: str) -> None:
    """The first outputs are the same when nothing follows."""
    whole = run(inputs)  # (..., B, T, width)
    for n in (1, 2, 3, 7, inputs.shape[1] - 1):
        gap = (run(inputs[:, :n]) - whole[..., :n, :]).abs().max()
        assert gap <= CLOSE, f"{what}: the first {n} outputs differ by {gap:.1e} when nothing follows"


def check_gradients(module: nn.Module, idle: Collection[str], what: str) -> None:
    """Every parameter has received a finite gradient that is not all zero; those named in `idle` need not."""
    for name, p in module.named_parameters():
        if p.requires_grad and name not in idle:
            assert p.grad is not None and p.grad.any(), f"{what}: no gradient reaches {name} {tuple(p.shape)}"
        assert p.grad is None or p.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite"


# ---------------------------------------------------------------------- a part


def kind_of(part: Callable | nn.Module) -> type:
    """The class that a factory builds, as far as it can be known before it does."""
    while isinstance(part, partial):
        part = part.func
    return part if isinstance(part, type) else type(part)


def layers_of(part: Callable | nn.Module, site: Site, heads: Heads) -> nn.ModuleList:
    """The part as each layer of a model would build it; a module, or a kind without layers, just once."""
    if isinstance(part, nn.Module):
        return nn.ModuleList([part])
    table = nn.Embedding(site.vocab_size, site.d_model)
    once = {Norm: (site.d_model,), Activation: (), Positions: (site,), Head: (site, table)}
    for kind, facts in once.items():
        if issubclass(kind_of(part), kind):
            return nn.ModuleList([part(*facts)])
    sites = [replace(site, layer=layer) for layer in range(site.n_layers)]
    on_heads = issubclass(kind_of(part), HeadEdit | Core)
    return nn.ModuleList(part(replace(heads, site=at) if on_heads else at) for at in sites)


def runner(layers: nn.ModuleList, site: Site, heads: Heads) -> Run:
    """The layers as one function of a stream (B, T, width), outputs stacked; all read the same stream and carry."""

    def call(layer: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        if isinstance(layer, HeadEdit | Core):
            projected = x.unflatten(-1, (-1, heads.dim)).transpose(1, 2)  # (B, H + 2 G, T, K)
            qkv = projected.split([heads.n, heads.n_kv, heads.n_kv], dim=1)
            out = torch.cat(layer(*qkv, carry), dim=1) if isinstance(layer, HeadEdit) else layer(*qkv)
            return out.transpose(1, 2).flatten(2)
        if isinstance(layer, Positions):
            return layer(carry.tokens).expand(*x.shape[:2], site.d_model)
        return layer(x) if isinstance(layer, Norm | Activation | Head) else layer(x, carry)

    def run(x: Tensor) -> Tensor:
        tokens = (x.detach().float()[..., 0] * 1000).long() % site.vocab_size  # read off the stream: changed with it
        carry = Carry(tokens, x)
        return torch.stack([call(layer, x, carry) for layer in layers])  # (L, B, T, width)

    return run


def check_shapes(run: Run, layers: nn.ModuleList, x: Tensor, what: str) -> None:
    """Outputs have their input's dtype, are finite, and as wide as their kind says."""
    same_width = not isinstance(layers[0], Head | Core | Positions)
    for dtype in (torch.bfloat16, torch.float32):  # float32 last: the layers stay as they are left here
        layers.to(dtype)
        y = run(x.to(dtype))
        assert y.dtype == dtype, f"{what}: {dtype} in, {y.dtype} out"
        assert y.isfinite().all(), f"{what}: an output is not finite in {dtype}"
        assert y.shape[1:3] == x.shape[:2], f"{what}: (B, T) of {tuple(x.shape)} became {tuple(y.shape[1:])}"
        assert y.shape[-1] == x.shape[-1] or not same_width, f"{what}: width {x.shape[-1]} became {y.shape[-1]}"


def check_gradient_causal(run: Run, x: Tensor, what: str) -> None:
    """No gradient flows from an output to a later input."""
    x = x.detach().requires_grad_()
    y = run(x)
    y = y * torch.randn_like(y)  # a plain sum can cancel
    for t in range(x.shape[1]):
        (grad,) = torch.autograd.grad(y[..., t, :].sum(), x, retain_graph=True, allow_unused=True)
        leak = 0.0 if grad is None else grad[:, t + 1 :].abs().sum()
        assert leak <= TOLERANCE, f"{what}: a gradient of {leak:.1e} flows from output {t} to later inputs"


def check_learns(run: Run, layers: nn.ModuleList, x: Tensor, what: str) -> None:
    """A few steps of Adam reduce a regression loss."""
    target = torch.randn_like(run(x))
    optimizer = torch.optim.Adam(layers.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.mse_loss(run(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0], f"{what}: 30 steps took a regression loss from {losses[0]:.4f} to {losses[-1]:.4f}"


def check_part(
    part: Callable | nn.Module, *, site: Site = SITE, heads: Heads = HEADS, idle: Collection[str] = ()
) -> None:
    """Check the promises of a part: a sequence or channel mixer, block, head edit, core, norm, activation, positions, head.

    Args:
        part: a factory (a class, or functools.partial of one), built for every layer of `site`; or a built module.
        site, heads: the facts it is built from.
        idle: names of parameters that rightly receive no gradient, such as "0.gain" for layer 0.
    """
    torch.manual_seed(0)
    what = kind_of(part).__name__
    layers = noisy(layers_of(part, site, heads)).eval()
    run, kind = runner(layers, site, heads), layers[0]
    width = (heads.n + 2 * heads.n_kv) * heads.dim if isinstance(kind, HeadEdit | Core) else site.d_model
    x = torch.randn(3, LENGTHS[-1], width)
    check_shapes(run, layers, x, what)
    check_alone(run, x, what)
    for length in LENGTHS:
        for training in (True, False):
            layers.train(training)
            moved = influence(run, *torch.randn(2, length, width))  # (L, T, T)
            check_causal(moved, f"{what} in {'train' if training else 'eval'} mode")
    if not isinstance(kind, Positions):
        check_responsive(moved, what)
    if isinstance(kind, SequenceMixer):
        assert (moved[:, 0, 1:].amax(-1) > TOLERANCE).all(), f"{what}: no later output moves with input 0; nothing is mixed"
    if isinstance(kind, ChannelMixer | Norm | Activation | Head):
        assert moved.triu(1).max() <= TOLERANCE, f"{what}: moves information between positions"
    check_prefix(run, x, what)
    check_gradient_causal(run, x, what)
    if any(p.requires_grad for p in layers.parameters()):
        (run(x) * torch.randn_like(run(x))).sum().backward()
        check_gradients(layers, idle, what)
        check_learns(run, layers, x, what)


# ---------------------------------------------------------------------- a model


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
        loss, terms = model.objective(tokens[:, :-1], tokens[:, 1:])
        sum(terms.values(), loss).backward()
        optimizer.step()
        losses.append(loss.item())
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
        for loss in (lambda: model.objective(tokens, targets)[0], lambda: mean_loss(model, tokens, targets)):
            torch.manual_seed(3)  # the same dropout
            losses.append(loss().item())
        gap = abs(losses[0] - losses[1])
        assert gap <= CLOSE, f"objective: next-token loss {losses[0]:.6f}, but cross-entropy of forward {losses[1]:.6f}"
    nats = model.measure(tokens, targets).item() / (targets >= 0).sum().item()
    assert abs(nats - losses[1]) <= CLOSE, f"measure: {nats:.6f} nats a token, but cross-entropy of forward {losses[1]:.6f}"


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
    assert unforeseen >= uniform - 0.05, f"fresh random tokens: loss {unforeseen:.3f} below ln V = {uniform:.3f}: a leak"
