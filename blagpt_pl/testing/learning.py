"""How a model learns: from where, what it is told to minimise, with all of its parameters, and nothing that cannot be known.

Each function takes a `Subject`, returns what it measured, and raises AssertionError where a promise is broken.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from blagpt_pl.testing.promises import CLOSE, check_gradients
from blagpt_pl.testing.subject import LEARNT, Subject, mean_loss, put_back, train

BATCHES = 8  # in which every parameter must have been reached
UNREACHED = "(where that is meant: self.idle = {name: reason} in its module)"
SLACK = 0.05  # nats below ln V that chance may give


def objective(subject: Subject) -> str:
    """The next-token part of the objective is the cross-entropy of `forward`: nothing shifts the targets a second time."""
    model, tokens = subject.moved, subject.tokens(2, 3, subject.length)
    tokens, targets = tokens
    targets[0, -2:] = -100  # torch's ignore_index
    targets[1, :2] = torch.tensor([0, subject.model.vocab_size - 1])  # the tokens that are most often special
    given, buffers = targets.clone(), {name: b.clone() for name, b in model.named_buffers()}
    for training in (True, False):
        model.train(training)
        put_back(model, buffers)
        torch.manual_seed(3)
        total, parts = model.objective(tokens, targets)
        put_back(model, buffers)
        torch.manual_seed(3)  # the same dropout
        losses = [parts["loss"].item(), mean_loss(model, tokens, given).item()]
        assert torch.equal(targets, given), "objective: writes into the targets it is given"
        told = sum(part.item() for part in parts.values())
        assert abs(total.item() - told) <= CLOSE * max(1.0, abs(told)), (
            f"objective: minimises {total.item():.6f}, but the numbers it gives ({', '.join(parts)}) sum to {told:.6f}"
        )
        gap = abs(losses[0] - losses[1])
        assert gap <= CLOSE, f"objective: next-token loss {losses[0]:.6f}, but cross-entropy of forward {losses[1]:.6f}"
    return f"differs from cross-entropy of forward by {gap:.0e}"


def ruler(subject: Subject) -> str:
    """What validation adds up is the cross-entropy of `forward`."""
    model, length = copy.deepcopy(subject.moved).eval(), subject.lengths[-1]
    tokens, targets = subject.tokens(2, 23, length)
    targets[0, -2:] = -100
    targets[1, :2] = torch.tensor([0, subject.model.vocab_size - 1])
    with torch.no_grad():
        loss = mean_loss(model, tokens, targets).item()
        nats = model.measure(tokens, targets).item() / (targets >= 0).sum().item()
        for i, rows in enumerate((slice(0, 20), slice(20, None))):  # as an evaluation goes, in batches of unlike sizes
            model.validation_step((tokens[rows], targets[rows]), i)
    gap = abs(nats - loss)
    assert gap <= CLOSE, f"measure: {nats:.6f} nats a token, but cross-entropy of forward {loss:.6f}"
    said = float(model.ruler.compute()["loss"])
    assert abs(said - loss) <= CLOSE, f"validation_step: val/loss {said:.6f}, but cross-entropy of forward {loss:.6f}"
    return f"differs from cross-entropy of forward by {gap:.0e}"


@torch.no_grad()
def first_loss(subject: Subject) -> str:
    """Before it has learnt anything, a model knows nothing: ln V."""
    tokens = subject.tokens(8, subject.length + 1 if subject.length < subject.model.context else subject.length)
    first = mean_loss(subject.fresh(), tokens[:, :-1], tokens[:, 1:]).item()
    far = abs(first - subject.uniform)
    assert far <= subject.init_tolerance, f"first loss {first:.3f}, but ln V = {subject.uniform:.3f}"
    return f"{first:.3f}, ln V = {subject.uniform:.3f}"


def gradients(subject: Subject) -> str:
    """After three steps every parameter has received a gradient, each row and column of every matrix too."""
    model = subject.fresh()
    tokens = subject.tokens(8, subject.length)
    train(model, 3, lambda: tokens)
    model.zero_grad()
    for _ in range(BATCHES):  # until all that only some tokens reach, such as an expert, has been reached
        total, _ = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        if all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad):
            break
        tokens = subject.tokens(8, subject.length)
    try:
        check_gradients(model, subject.idle, "after 3 steps")
    except AssertionError as error:
        raise AssertionError(f"{error} {UNREACHED}") from None
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name not in subject.idle]
    assert not frozen, f"{frozen[0]} is frozen; fix: a buffer, or self.idle = {{name: reason}} in its module"
    strangers = leaves(model.objective(tokens[:, :-1], tokens[:, 1:])[0]) - {id(p) for p in model.parameters()}
    assert not strangers, (
        f"{len(strangers)} trainable tensors are no parameters of the model (a plain list of modules?)"
    )
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    counted = 0
    for name, p in model.named_parameters():
        if p.requires_grad and name not in subject.idle and id(p) not in tables:
            counted += 1
            for dim in range(p.ndim if p.ndim > 1 else 0):
                places = (p.grad != 0).movedim(dim, 0).flatten(1).any(1)
                dead = (~places).nonzero().flatten().tolist()
                assert not dead, (
                    f"no gradient reaches {name} {tuple(p.shape)} at {len(dead)} of {p.shape[dim]} places of dimension "
                    f"{dim}: {', '.join(map(str, dead[:8]))}{', ...' if len(dead) > 8 else ''}"
                )
    idle = f", {len(subject.idle)} declared idle" if subject.idle else ""
    return f"all {len(list(model.parameters()))} tensors, {counted} row by row{idle}"


def leaves(loss: Tensor) -> set[int]:
    """The identities of all tensors that a backward pass would leave a gradient in."""
    seen, todo, found = set(), [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(id(node.variable))
    return found


def slopes(subject: Subject) -> str:
    """The gradient is that of the objective: by each tensor, the slope along a random direction, measured in float64."""
    model, (tokens, targets) = copy.deepcopy(subject.exact).eval(), subject.tokens(2, 2, subject.length)
    model.objective(tokens, targets)[0].backward()
    named = {name: p for name, p in model.named_parameters() if p.grad is not None}
    typical = {name: (p.grad.norm() / p.numel() ** 0.5).item() for name, p in named.items()}  # along such a direction
    with Narrow() as narrowed, torch.enable_grad():
        model(tokens)
    narrow, worst = narrowed.found, 0.0
    for name, p in named.items():
        way = nn.functional.normalize(torch.randn_like(p).flatten(), dim=0).view_as(p)
        said = (p.grad.conj() * way).sum().real.item()

        def along(step: float, way: Tensor = way, p: Tensor = p) -> float:
            return slope_along(way, p, step, lambda: model.objective(tokens, targets)[0].item())

        slope, allowed = along(1e-5), 1e-3
        size = max(abs(slope), typical[name], 1e-3 * max(typical.values()))
        if narrow:  # too rough for so small a step
            slope = along(3e-3)
            size = max(abs(slope), typical[name], 1e-3 * max(typical.values()))
            allowed = 5e-2 + 3 * abs(slope - along(6e-3)) / size
        gap = abs(slope - said) / size
        assert gap <= allowed, f"the objective changes along {name} by {slope:.3e}, but its gradient says {said:.3e}"
        worst = max(worst, gap)
    inside = " (something computes in float32 whatever it is given)" if narrow else ""
    return f"{len(named)} tensors, slopes differ by {worst:.0e}{inside}"


class Narrow(TorchFunctionMode):
    """Finds out whether a float64 model makes numbers of another kind on the way from its parameters."""

    found = False

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, Tensor)
            and out.requires_grad
            and out.dtype in (torch.float32, torch.bfloat16, torch.float16)
        ):
            self.found = True
        return out


@torch.no_grad()
def slope_along(way: Tensor, p: Tensor, step: float, value: Callable[[], float]) -> float:
    """The symmetric difference quotient of a value as a parameter moves along a direction; the parameter is put back."""
    start, ends = p.clone(), []
    for shift in (step, -step):
        p.copy_(start + shift * way)
        ends.append(value())
    p.copy_(start)
    return (ends[0] - ends[1]) / (2 * step)


def overfits(subject: Subject) -> str:
    """Two sequences are learnt by heart."""
    _, losses = subject.overfitted
    assert losses[-1] < LEARNT, f"2 sequences still have a loss of {losses[-1]:.3f} after {len(losses)} steps of AdamW"
    return f"below {LEARNT} after {len(losses)} steps"


def fresh_data(subject: Subject) -> str:
    """Fresh uniform random tokens cannot be foreseen: whoever has a loss below ln V on them has seen them."""
    model, _ = subject.overfitted
    tokens = subject.tokens(16, subject.length)
    with torch.no_grad():
        unseen = mean_loss(model, tokens[:, :-1], tokens[:, 1:]).item()
    said = f"ln V = {subject.uniform:.3f}: a leak"
    assert unseen >= subject.uniform - SLACK, f"after overfitting, fresh random tokens: loss {unseen:.3f} below {said}"
    losses = train(subject.fresh(training=True), 100, lambda: subject.tokens(8, subject.length))
    mean = sum(losses[-30:]) / 30
    assert mean >= subject.uniform - SLACK, f"trained on fresh random tokens: loss {mean:.3f} below {said}"
    return f"{unseen:.2f} after overfitting, {mean:.3f} when trained on it; ln V = {subject.uniform:.3f}"
