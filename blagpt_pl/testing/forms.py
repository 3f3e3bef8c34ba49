"""The forms a model takes: saved and loaded, compiled, in bfloat16, generating, as groups for an optimizer, as a number.

Each function takes a `Subject`, returns what it measured, and raises AssertionError where a promise is broken.
"""

import copy
import io

import torch
from torch import Tensor, nn

from blagpt_pl.nn.states import States
from blagpt_pl.optim.roles import OWN, ROLES
from blagpt_pl.testing.promises import CLOSE
from blagpt_pl.testing.subject import Subject, train

PIECES = 1e-9  # between a sequence and its pieces, in float64


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The sets of names under which one tensor is known."""
    names: dict[int, set[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _named(groups: set[frozenset[str]]) -> str:
    return "; ".join(" = ".join(sorted(group)) for group in groups) or "none"


def roles(subject: Subject) -> str:
    """Every distinct parameter has exactly one role, and nothing else has one."""
    said, names = subject.model.parameter_roles(), {name for name, _ in subject.model.named_parameters()}
    odd = sorted(names ^ said.keys())
    assert not odd, f"parameter_roles: {odd[0]} {'has no role' if odd[0] in names else 'is no parameter'}"
    unknown = sorted(set(said.values()) - set(ROLES))
    assert not unknown, f"parameter_roles: unknown role {unknown[0]!r} (expected one of {', '.join(sorted(ROLES))})"
    for name, p in subject.model.named_parameters():
        fits = said[name] == "vector" if p.ndim < 2 else said[name] != "vector"
        assert fits or said[name] in OWN, f"parameter_roles: {name} {tuple(p.shape)} is no {said[name]}"
    return ", ".join(f"{list(said.values()).count(role)} {role}" for role in sorted(set(said.values())))


def parameters(subject: Subject) -> str:
    """The number of parameters is what was announced, and no two tensors share memory: a tied weight is one, counted once."""
    owners: dict[int, str] = {}
    for name, p in subject.model.named_parameters():
        other = owners.setdefault(p.untyped_storage()._cdata, name)
        assert other == name, (
            f"{other} and {name} are two parameters in one memory, counted and updated twice (tie them as one)"
        )
    n = sum(p.numel() for p in subject.model.parameters())
    assert subject.described in (None, n), f"{n:,} parameters, but describe counts {subject.described:,}"
    return f"{n:,}" if subject.described is None else f"{n:,}, as described"


@torch.no_grad()
def state_dict(subject: Subject) -> str:
    """A checkpoint brings every logit back exactly, into a model built anew; what it holds depends on nothing that was run."""
    model, tokens = subject.moved.eval(), subject.tokens(2, subject.length)
    before = {name: t.shape for name, t in model.state_dict().items()}
    logits = model(tokens)
    after = {name: t.shape for name, t in model.state_dict().items()}
    assert before == after, f"state_dict: {min(before.items() ^ after.items())[0]} depends on what was run"
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(6)
    other = subject.rebuild().eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(tokens), logits), "state_dict: logits differ after a round trip"
    assert ties(other) == ties(model), (
        f"state_dict: tied tensors were {_named(ties(model))}, became {_named(ties(other))}"
    )
    return f"{len(after)} tensors, logits equal bit for bit"


def tied(subject: Subject) -> str:
    """Tied tensors stay one through training and copying."""
    model = subject.fresh()
    tokens = subject.tokens(2, subject.length)
    train(model, 2, lambda: tokens)
    assert ties(model) == ties(subject.model), (
        f"training: tied tensors were {_named(ties(subject.model))}, became {_named(ties(model))}"
    )
    return _named(ties(model))


def bf16(subject: Subject) -> str:
    """Under bf16 autocast the loss is within 1 % and every gradient is finite."""
    model, (tokens, targets) = copy.deepcopy(subject.moved).eval(), subject.tokens(2, 4, subject.length)
    exact = model.objective(tokens, targets)[0].item()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        total, _ = model.objective(tokens, targets)
    gap = abs(total.item() - exact) / exact
    assert gap <= 0.01, f"bf16: objective {total.item():.4f}, but {exact:.4f} in float32"
    total.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), f"bf16: the gradient of {name} is not finite"
    return f"objective differs by {gap:.4%}"


def compiled(subject: Subject) -> str:
    """Every region is one graph, and compiled it computes the same: logits, objective, gradients (backend aot_eager)."""
    tokens, targets = subject.tokens(2, 2, subject.length)
    torch._dynamo.reset()
    try:
        outcomes = []
        for backend in (None, "aot_eager"):
            model = copy.deepcopy(subject.moved).eval()
            if backend is not None:
                model.compile_regions(backend)
            total, _ = model.objective(tokens, targets)
            total.backward()
            with torch.no_grad():
                logits = model(tokens)
            outcomes.append({"logits": logits, "objective": total.detach()} | _gradients(model))
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.BackendCompilerFailed) as error:
        text = " ".join(str(error).split())
        raise AssertionError(f"compiled: a region is not one graph: {text[:160]}") from error
    finally:
        torch._dynamo.reset()
    worst = 0.0
    for name, eager in outcomes[0].items():
        gap = ((outcomes[1][name] - eager).abs().max() / eager.abs().max().clamp(min=1.0)).item()
        assert gap <= CLOSE, f"compiled, {name}: {gap:.1e} away from eager"
        worst = max(worst, gap)
    return f"{sum(1 for _ in subject.model.regions())} regions, one graph each; differs by {worst:.0e}"


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {f"the gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def generate(subject: Subject) -> str:
    """Greedy generation picks what `forward` ranks first, given the same prefix, all at once or piece by piece."""
    model, length = subject.moved.eval(), subject.length
    prompt = subject.tokens(2, max(1, length // 2))
    new = length - length // 2
    tokens = model.generate(prompt, new, temperature=0)
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt), "generate: does not begin with the prompt"
    logits = model(tokens[:, :-1])[:, prompt.shape[1] - 1 :].float()  # (B, new, V)
    behind = logits.amax(-1) - logits.gather(-1, tokens[:, prompt.shape[1] :, None])[..., 0]
    assert behind.max() <= CLOSE, f"generate: chose a token {behind.max():.1e} below the likeliest of forward"
    tokens = subject.tokens(2, subject.lengths[-1])
    whole = model(tokens)
    for n in range(1, tokens.shape[1] + 1):  # what ranks first may hang on the last token alone
        gap = (model.next_logits(tokens[:, :n]) - whole[:, n - 1]).abs().max()
        assert gap <= CLOSE, f"next_logits: differ from those of forward by {gap:.1e}, given {n} tokens"
    if not model.can_continue():
        return f"{new} tokens, as forward ranks them"
    exact = subject.exact.eval()
    whole = exact(tokens)
    for edges in (range(1, tokens.shape[1]), [n for n in (5, 6, 13, 15) if n < tokens.shape[1]]):
        states = States()
        for piece in tokens.tensor_split(list(edges), dim=1):
            logits, states = exact.next_logits(piece, states), states.after(piece.shape[1])
            gap = (logits - whole[:, states.start - 1]).abs().max()
            assert gap <= PIECES, f"generate: {states.start} tokens given piece by piece make a difference of {gap:.1e}"
    return f"{new} tokens, as forward ranks them; a token costs {'its own and memory' if states.grows else 'its own'}"
