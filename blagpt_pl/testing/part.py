"""The promises of a part: shapes, causality, responsiveness, batch invariance, prefixes, gradients, learning."""

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
)
from blagpt_pl.testing.promises import (
    LENGTHS,
    TOLERANCE,
    Run,
    check_alone,
    check_causal,
    check_gradients,
    check_prefix,
    check_responsive,
    influence,
    noisy,
)

SITE = Site(d_model=32, n_layers=2, layer=0, vocab_size=61, context=32)
HEADS = Heads(SITE, n=4, n_kv=2, dim=8)


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
    assert losses[-1] < 0.97 * losses[0], (
        f"{what}: 30 steps took a regression loss from {losses[0]:.4f} to {losses[-1]:.4f}"
    )


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
        assert (moved[:, 0, 1:].amax(-1) > TOLERANCE).all(), (
            f"{what}: no later output moves with input 0; nothing is mixed"
        )
    if isinstance(kind, ChannelMixer | Norm | Activation | Head):
        before = getattr(kind, "reads_before", 0)
        beyond = f", beyond the {before} before it that it says it reads" if before else ""
        assert moved.triu(1 + before).max() <= TOLERANCE, f"{what}: moves information between positions{beyond}"
    check_prefix(run, x, what)
    check_gradient_causal(run, x, what)
    if any(p.requires_grad for p in layers.parameters()):
        (run(x) * torch.randn_like(run(x))).sum().backward()
        check_gradients(layers, idle, what)
        check_learns(run, layers, x, what)
