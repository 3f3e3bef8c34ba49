"""Single promises about anything that maps (B, T, ...) inputs to (..., B, T, width) outputs, each a check of its own."""

import copy
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

LENGTHS = (13, 23)
TOLERANCE = 1e-6  # what rounding may move; a leak moves more
EXACT = 1e-10  # the same in float64
CLOSE = 1e-5  # between two ways to compute the same

Run = Callable[[Tensor], Tensor]  # inputs (B, T, ...) -> outputs (..., B, T, width)


def noisy(module: nn.Module) -> nn.Module:
    """A copy whose parameters are all moved by N(0, 0.03²)."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.03)
    return module


def influence(run: Run, one: Tensor, other: Tensor, training: bool = False) -> Tensor:
    """(..., T, T): at [t, s], how far output s moves when input t of `one` (T, ...) becomes that of `other`.

    With `training` gradients are enabled, as they are there.
    """
    here = torch.eye(len(one), dtype=torch.bool, device=one.device).reshape(len(one), len(one), *[1] * (one.ndim - 1))
    outputs = []
    for rows in (one.repeat(len(one), *[1] * one.ndim), torch.where(here, other, one)):  # (T, T, ...)
        torch.manual_seed(2)  # the same dropout
        with torch.set_grad_enabled(training):
            y = run(rows).detach()
        outputs.append(y if y.dtype == torch.float64 else y.float())
    return (outputs[1] - outputs[0]).abs().amax(-1)


def check_causal(moved: Tensor, what: str) -> None:
    """No output moves with a later input, be it ever so little where it was computed in float64."""
    early = moved.tril(-1).reshape(-1, *moved.shape[-2:]).amax(0)
    t, s = divmod(int(early.argmax()), early.shape[-1])
    assert early.max() <= (EXACT if moved.dtype == torch.float64 else TOLERANCE), (
        f"{what}: looks into the future: output {s} moves by {early.max():.1e} with input {t}"
    )


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
def check_prefix(run: Run, inputs: Tensor, what: str, more: Collection[int] = ()) -> None:
    """The first outputs are the same when nothing follows, after few inputs, all but one, and any `more`."""
    whole = run(inputs)  # (..., B, T, width)
    for n in sorted({1, 2, 3, 7, inputs.shape[1] - 1, *more}):
        gap = (run(inputs[:, :n]) - whole[..., :n, :]).abs().max()
        assert gap <= CLOSE, f"{what}: the first {n} outputs differ by {gap:.1e} when nothing follows"


def check_gradients(module: nn.Module, idle: Collection[str], what: str) -> None:
    """Every parameter has received a finite gradient that is not all zero; those named in `idle` need not."""
    for name, p in module.named_parameters():
        if p.requires_grad and name not in idle:
            assert p.grad is not None and p.grad.any(), f"{what}: no gradient reaches {name} {tuple(p.shape)}"
        assert p.grad is None or p.grad.isfinite().all(), f"{what}: the gradient of {name} is not finite"
