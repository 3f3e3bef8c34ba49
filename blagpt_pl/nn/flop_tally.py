"""Whose an operation is: a tally by module of what runs, forward and backward, in one pass over a model.

How      a module's forward is a frame while it runs. Nodes of the autograd graph are numbered as they are made, so that
         one that runs in the backward pass tells which frame was the innermost when it was made
Words    a frame may be counted as a whole, by what it is said to cost: what runs inside is not counted by operation,
         and twice its cost is added when a backward pass first reaches it
"""

import inspect
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blagpt_pl.nn.base import Core, Part
from blagpt_pl.nn.flop_rules import attention_flops, flops, name_of

OUTSIDE = -1  # the number of no backward pass


class Word(NamedTuple):
    """What a call is said to cost: FLOPs of its forward, and which backward passes have reached it."""

    forward: int
    reached: set[int]


class Frame(NamedTuple):
    """A call that is under way: of which module, whether counted as a whole, and in which backward pass it began."""

    path: str
    word: Word | None = None
    task: int = OUTSIDE


class Tally(TorchDispatchMode):
    """Counts what runs while it is on.

    Attributes:
        forward, backward: FLOPs by path of the module, "" outside of all that are watched.
        uncounted: how often an operation without a rule ran, by name.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.forward, self.backward, self.uncounted = Counter(), Counter(), Counter()
        self._frames = [Frame("")]
        self._starts, self._owners = [0], self._frames[:]  # from this node on, this frame was the innermost
        self._failed: tuple[BaseException | None, str] = (None, "")

    def place_of(self, error: BaseException) -> str:
        """The path, and the operation if it was one, that an exception came from; each after a sign."""
        return self._failed[1] if self._failed[0] is error else ""

    def watch(self, path: str, module: nn.Module, batch: int, context: int) -> None:
        """Make each call of a module a frame; one whose `flops_per_token(context)` answers is counted by its word."""
        forward, word = module.forward, word_of(module, path, context)

        @wraps(forward)
        def call(*args: object, **kwargs: object) -> object:
            cost = None
            if word is not None:
                rows, length = batch, context
                if isinstance(module, Core | Part):  # may be called on pieces of the step
                    first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
                    rows, length = first.shape[0], first.shape[-2]  # q (B, H, T, K) or x (B, T, D)
                cost = word(length) * rows * length
            with self._frame(path, cost):
                return forward(*args, **kwargs)

        module.forward = call

    def attend(self, attention: Callable, args: tuple, kwargs: dict) -> Tensor:
        """A call of scaled_dot_product_attention, counted as a whole: on this device it would make all pairs."""
        with self._frame(self._frames[-1].path, attention_flops(*args, **kwargs)):
            return attention(*args, **kwargs)

    @contextmanager
    def _frame(self, path: str, cost: int | None) -> Iterator[None]:
        outer, task = self._frames[-1], torch._C._current_graph_task_id()
        frame = Frame(path, None, task)
        if outer.word is not None:  # already counted
            frame = Frame(outer.path, outer.word, task)
        elif cost is not None:
            self._add(path, cost, task)
            frame = Frame(path, Word(cost, set()), task)
        self._frames.append(frame)
        self._begin(frame)
        try:
            yield
        except Exception as error:
            self._fail(error, path)
            raise
        finally:
            self._frames.pop()
            self._begin(outer)

    def _begin(self, frame: Frame) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())
        self._owners.append(frame)

    def _add(self, path: str, cost: int, task: int) -> None:
        (self.forward if task == OUTSIDE else self.backward)[path] += cost

    def _fail(self, error: BaseException, path: str, operation: str = "") -> None:
        if self._failed[0] is not error:
            self._failed = (error, f".{path}" * bool(path) + f": {operation}" * bool(operation))

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        frame, task = self._frames[-1], torch._C._current_graph_task_id()
        inside = frame.word is not None  # of a call that is already counted, gradients taken in its forward too
        differentiates = task != frame.task  # else a forward, or one that is run again in a backward pass
        node = torch._C._current_autograd_node() if differentiates else None
        if node is not None:
            frame = self._owners[bisect_right(self._starts, node._sequence_nr()) - 1]
        try:
            out = func(*args, **(kwargs or {}))
        except Exception as error:
            self._fail(error, frame.path, name_of(func))
            raise
        if inside or frame.word is not None:
            if not inside and differentiates and task not in frame.word.reached:
                frame.word.reached.add(task)
                self._add(frame.path, 2 * frame.word.forward, task)
            return out
        cost = flops(func, args, out)
        if cost is None:
            self.uncounted[name_of(func)] += 1
        elif cost:
            self._add(frame.path, cost, task)
        return out


class AttentionCalls(TorchFunctionMode):
    """While it is on, calls of scaled_dot_product_attention go through a tally, those of torch's own modules too."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally = tally
        self.attention = F.scaled_dot_product_attention

    def __enter__(self) -> Self:
        def counted(*args: object, **kwargs: object) -> Tensor:
            return self.tally.attend(self.attention, args, kwargs)

        F.scaled_dot_product_attention = counted  # a mode is off inside of torch's own functions
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        F.scaled_dot_product_attention = self.attention
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        if func is self.attention:  # imported by its name
            return self.tally.attend(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def word_of(module: nn.Module, path: str, context: int) -> Callable[[int], int] | None:
    """What a module says that its forward costs a token; None where it says nothing.

    Raises:
        ValueError: it says something that is no whole number.
    """
    says = getattr(module, "flops_per_token", None)
    if says is None or len(inspect.signature(says).parameters) != 1:  # that of a whole model takes no context
        return None
    try:
        word = says(context)
    except NotImplementedError:
        return None
    if not isinstance(word, int):
        told = f"model.{path}: flops_per_token({context}) is {word!r} (expected a whole number)"
        raise ValueError(told)  # noqa: TRY004
    return says
