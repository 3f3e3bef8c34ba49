"""The certificate of a model: every promise, whether it is kept, and what was measured.

A promise is a function that takes a `Subject`, returns a line, and raises AssertionError; any other error counts as broken,
too. A model, or any module in it, may declare by an attribute `exempt` (promise → reason) that one is not made, except those
of `FIRM`.
"""

import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn

from blagpt_pl.testing.forms import bf16, compiled, generate, parameters, roles, state_dict, tied
from blagpt_pl.testing.learning import first_loss, fresh_data, gradients, objective, overfits, ruler, slopes
from blagpt_pl.testing.reading import (
    NotHere,
    batch,
    causality,
    gradient_causality,
    long_memory,
    no_memory,
    prefix,
    responsiveness,
    runs,
)
from blagpt_pl.testing.subject import Subject

KEPT, BROKEN, DECLARED, NOT_HERE = "kept", "BROKEN", "declared", "not here"


@dataclass(frozen=True)
class Verdict:
    """What came of one promise.

    Attributes:
        promise: its name.
        state: kept, BROKEN, declared (broken, as the model says it would be) or not here (cannot be examined).
        found: what was measured, or what broke.
        seconds: how long it took.
        error: whether something went wrong that is no finding of the promise's own.
    """

    promise: str
    state: str
    found: str
    seconds: float
    error: bool = False


def declarations(subject: Subject) -> str:
    """What is declared exempt is a promise that may be, what is declared idle is a parameter."""
    for name in subject.exempt:
        assert name in PROMISES, f"exempt: {name!r} is no promise (expected one of {', '.join(PROMISES)})"
        assert name not in FIRM, f"exempt: {name!r} is a law, from which nothing is exempt"
    known = {name for name, _ in subject.model.named_parameters(remove_duplicate=False)}
    for name in subject.idle:
        assert name in known, f"idle: {name} is no parameter"
    return f"{len(subject.exempt)} exempt, {len(subject.idle)} idle"


def _accumulation(subject: Subject) -> str:
    """Two micro-batches of one sequence are one of two, and three are one of three."""
    from blagpt_pl.testing.training import check_accumulation  # Lightning takes seconds to import

    return check_accumulation(subject.model)


def _resume(subject: Subject) -> str:
    """A run that was stopped and resumed is the uninterrupted one, bit for bit."""
    from blagpt_pl.testing.resuming import check_resume

    return check_resume(subject.model)


def _optimizer(subject: Subject) -> str:
    """Every parameter is in exactly one group of the optimizer, and every group moves."""
    from blagpt_pl.testing.updates import check_optimizer

    return check_optimizer(subject.model, subject.clip)


PROMISES: dict[str, Callable[[Subject], str]] = {
    "runs": runs,
    "declarations": declarations,
    "roles": roles,
    "parameters": parameters,
    "first loss": first_loss,
    "causality": causality,
    "gradient causality": gradient_causality,
    "responsiveness": responsiveness,
    "long memory": long_memory,
    "batch": batch,
    "prefix": prefix,
    "no memory": no_memory,
    "objective": objective,
    "ruler": ruler,
    "generate": generate,
    "state dict": state_dict,
    "ties": tied,
    "gradients": gradients,
    "slopes": slopes,
    "bf16": bf16,
    "accumulation": _accumulation,
    "optimizer": _optimizer,
    "resume": _resume,
    "compiled": compiled,
    "overfits": overfits,
    "fresh data": fresh_data,
}
LAWS = {"causality", "gradient causality", "objective", "ruler", "fresh data", "resume"}
FIRM = {"runs", "declarations", *LAWS}  # nothing is exempt from these


def certify(
    subject: Subject, only: Collection[str] | None = None, seed: int = 0, threads: int | None = 1
) -> Iterator[Verdict]:
    """Examine a model; verdicts come as they are reached.

    Args:
        subject: the model, which is left as it was; so is the state of torch's generators.
        only: names of the promises to look at; all by default.
        seed: each promise begins from it, so that what it finds does not depend on the others.
        threads: of the CPU; tiny tensors are slower on many. None leaves torch's own number.
    """
    unknown = set(only or ()) - PROMISES.keys()
    if unknown:
        raise ValueError(f"{min(unknown)!r} is no promise (expected {', '.join(PROMISES)})")
    for name, promise in PROMISES.items():
        if only is None or name in only:
            with _apart(threads), torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
                torch.manual_seed(seed)
                verdict = _verdict(name, promise, subject)
            yield verdict
            if name == "runs" and verdict.error:
                return  # the same would be said of every other promise


@contextmanager
def _apart(threads: int | None) -> Iterator[None]:
    """With so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _verdict(name: str, promise: Callable[[Subject], str], subject: Subject) -> Verdict:
    start, error = time.perf_counter(), False
    try:
        state, found = KEPT, promise(subject)
    except NotHere as why:
        state, found = NOT_HERE, str(why)
    except AssertionError as broken:
        state, found = BROKEN, str(broken)
    except Exception as exception:  # noqa: BLE001 - whatever a model does wrong is a finding
        first = shorten(str(exception).strip() or "no message", 200)
        state, found, error = BROKEN, f"{type(exception).__name__}{place_of(exception)}: {first}", True
    if state == BROKEN and name in subject.exempt and name not in FIRM:
        state, found = DECLARED, subject.exempt[name]
    return Verdict(name, state, found, time.perf_counter() - start, error)


def place_of(error: BaseException) -> str:
    """In which module's own code an exception was raised: the innermost that is not torch's; empty if in none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not type(owner).__module__.startswith("torch."):
            found = f" in {type(owner).__name__} ({Path(frame.f_code.co_filename).name}:{line})"
    return found


def claim(name: str) -> str:
    """What a promise says, in a sentence."""
    return (PROMISES[name].__doc__ or "").strip().splitlines()[0]


def check_model(
    model: nn.Module,
    *,
    init_tolerance: float = 0.15,
    idle: Collection[str] = (),
    clip: float | None = None,
    only: Collection[str] | None = None,
) -> list[Verdict]:
    """Check the promises of a language model; a few seconds for a small one, which is left as it was.

    Args:
        model: a `LanguageModel`, freshly built.
        init_tolerance: how far the first loss may lie from ln V.
        idle: names of parameters that rightly receive no gradient.
        clip: the norm that gradients are clipped to in training, if they are.
        only: names of the promises to look at; all by default (`testing.certificate.PROMISES`).

    Returns:
        All verdicts.

    Raises:
        AssertionError: the first promise that is broken, and where.
    """
    verdicts = []
    for verdict in certify(Subject(model, init_tolerance, dict.fromkeys(idle, "named by the caller"), clip), only):
        if verdict.state == BROKEN:
            raise AssertionError(f"{verdict.promise}: {verdict.found}")
        verdicts.append(verdict)
    return verdicts
