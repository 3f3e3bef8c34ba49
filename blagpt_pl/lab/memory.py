"""What a training step keeps in memory on one device, found without a device and without the memory.

How   the model is built and one step is made with fake tensors, which have shapes and no data, and followed (`lab.follow`)
GPU   attention counts as a fused kernel, which keeps q, k, v, the result and one float32 a query. Everything else is
      counted as torch's CPU kernels keep it, without compilation some more than CUDA's (norms in several operations)
Not   seen: CUDA's context, libraries' workspaces, what the allocator rounds up or cannot use, the exchange of gradients
      between ranks (DDP with gradient_as_bucket_view holds no copy of them), sharding. `RESERVE` stands for the first three
State a prediction; compared with the peak of a CPU process (tests/lab/test_memory.py), with no GPU yet
"""

import gc
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensorMode

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.follow import Peaks, autocast_of, cast, follow, named_precision
from blagpt_pl.lab.fused import backend
from blagpt_pl.lab.kernels import gpu_kernels
from blagpt_pl.lab.storages import CATEGORIES, Storages
from blagpt_pl.lm import LanguageModel
from blagpt_pl.losses.chunked import FEWEST, LARGEST
from blagpt_pl.nn.flops import told

CHUNKS = FEWEST * LARGEST  # tokens beyond which the logits of a chunk take no more memory
PROBES = 8  # numbers that are followed before the search halves what is left
TOKENS = 32768  # of a forward, where the search for the largest batch begins
EAGER = "not compiled: norms are counted in the operations they have on a CPU, so activations are an upper bound"
COMPILED = "compiled: what regions keep is the partitioner's choice; what they need for a moment is estimated"
LOG = logging.getLogger("torch._subclasses.fake_tensor")
RESERVE = 0.06  # an assumption: CUDA's context (some 0.5 GB), libraries' workspaces, fragmentation


class CannotFollow(ValueError):
    """A model whose step cannot be followed: it reads the elements of a tensor, or runs an operation that fake ones lack."""


class StepMemory:
    """What a step needs, by category, for any number of sequences a forward; each number is followed once and kept.

    Attributes:
        model: under fake tensors; only its shapes mean anything.
        lower_bound: why the totals are a lower bound, or None.
        note: what else should be known about them.
    """

    def __init__(self, make: Callable[[], LanguageModel], context: int, precision: str | int, compiled: bool) -> None:
        self.context, self.precision, self.compiled = context, precision, compiled
        named_precision(precision)
        self._mode = FakeTensorMode()
        try:
            with self._without_memory():
                self.model = make()
                cast(self.model, precision)
                self.model.apply_memory_policy()
        except RuntimeError as error:
            raise CannotFollow(f"the model is not built without data ({told(error)})") from error
        self.note = COMPILED if compiled else EAGER
        self._found: dict[int, Peaks] = {}

    @property
    def lower_bound(self) -> str | None:
        return self.peaks(next(iter(self._found), 1)).problem

    def peaks(self, b: int) -> Peaks:
        """What was found for b sequences a forward, at every moment of a step."""
        if b < 1:
            raise ConfigError(f"data.device_batch_size: {b} (expected 1 or more)")
        if b not in self._found:
            self._found[b] = self._followed(b)
        return self._found[b]

    def moment(self, b: int, micro_batches: int = 2) -> str:
        """When a step needs most: forward, loss, backward or optimizer step."""
        return self._worst(b, micro_batches)[0]

    def at(self, b: int, micro_batches: int = 2) -> dict[str, int]:
        """Bytes by category (`storages.CATEGORIES`) when a step needs most, and their sum as `total`.

        Args:
            b: sequences a forward, on one device.
            micro_batches: forwards a step, on one device; with more than one, the first one's gradients are there.

        Raises:
            ConfigError: no sequence at all.
        """
        worst = self._worst(b, micro_batches)[1]
        return {name: worst[name] for name in CATEGORIES} | {"total": worst.total()}

    def largest_batch(self, memory_bytes: int, reserve: float = RESERVE, micro_batches: int = 2) -> int:
        """The most sequences a forward that fit, 0 if not even one does.

        Args:
            memory_bytes: of the device.
            reserve: the share of it that is left alone.
            micro_batches: as for `at`.

        Raises:
            ConfigError: a reserve that is no share.
        """
        if not 0 <= reserve < 1:
            raise ConfigError(f"reserve: {reserve} (expected a share of the memory, from 0 to below 1)")
        room = memory_bytes * (1 - reserve)
        fits, too_many, b = 0, math.inf, max(1, TOKENS // self.context)
        self.peaks(2 * b)
        while fits + 1 < too_many:
            if self._worst(b, micro_batches)[1].total() <= room:
                fits = b
            else:
                too_many = b
            lines = self._lines(b, micro_batches)
            guess = min(int((room - start) // slope) if slope > 0 else 2 * b for start, slope in lines)
            if guess == fits and all(n * self.context >= CHUNKS for n in (fits, *self._nearest(b))):
                break  # it fits, and one more would not: beyond a chunk of the loss all grows in a straight line
            if len(self._found) > PROBES and too_many < math.inf:
                guess = (fits + too_many) // 2  # what grows is no straight line
            b = int(min(max(guess, fits + 1), too_many - 1))
        return fits

    def _lines(self, b: int, micro_batches: int) -> list[tuple[float, float]]:
        """Bytes as a + slope · b, for each moment, through the two numbers nearest to b that were followed."""
        low, high = self._nearest(b)
        before, after = self._moments(low, micro_batches), self._moments(high, micro_batches)
        slopes = {name: (after[name].total() - before[name].total()) / (high - low) for name in after}
        return [(after[name].total() - slope * high, slope) for name, slope in slopes.items()]

    def _nearest(self, b: int) -> list[int]:
        """The two numbers nearest to b that were followed, the lower one first."""
        return sorted(sorted(self._found, key=lambda known: abs(known - b))[:2])

    def _moments(self, b: int, micro_batches: int) -> dict[str, Counter[str]]:
        found = self.peaks(b)
        return found.first if micro_batches == 1 else found.later

    def _worst(self, b: int, micro_batches: int) -> tuple[str, Counter[str]]:
        return max(self._moments(b, micro_batches).items(), key=lambda item: item[1].total())

    @contextmanager
    def _without_memory(self) -> Iterator[None]:
        with self._mode, torch.enable_grad(), warnings.catch_warnings(), gpu_kernels():
            warnings.simplefilter("ignore")  # torch's own, about tensors without data
            log, level = LOG, LOG.level
            log.setLevel(logging.CRITICAL)  # it logs a traceback of what it also raises
            try:
                yield
            finally:
                log.setLevel(level)

    def _followed(self, b: int) -> Peaks:
        try:
            return self._follow(b)
        except RuntimeError as error:
            raise CannotFollow(f"the model does not run without data ({told(error)})") from error

    def _follow(self, b: int) -> Peaks:
        gc.collect()
        with self._without_memory():
            batch = [torch.zeros(b, self.context, dtype=torch.int64) for _ in range(2)]
            if not self.compiled:
                return follow(self.model, *batch, autocast_of(self.precision), Storages())
            storages = Storages()
            torch._dynamo.reset()
            try:
                self.model.compile_regions(backend(storages))
                return follow(self.model, *batch, autocast_of(self.precision), storages)
            except TorchDynamoException as error:
                self.model.zero_grad()
                self.note = f"{EAGER}; it could not be followed compiled ({str(error).splitlines()[0]})"
                with torch.compiler.set_stance("force_eager"):
                    return follow(self.model, *batch, autocast_of(self.precision), Storages())
            finally:
                torch._dynamo.reset()  # what was compiled here computes nothing


def step_memory(
    make: Callable[[], LanguageModel], context: int, precision: str | int = "bf16-mixed", compiled: bool = True
) -> StepMemory:
    """Build a model without memory, ready to be asked what a step of it needs.

    Args:
        make: builds the model; called once, under fake tensors.
        context: T, tokens of a sequence.
        precision: as the trainer is told it.
        compiled: whether the regions and the loss are compiled.

    Raises:
        ConfigError: a precision that is not counted here; whatever `make` raises.
    """
    return StepMemory(make, context, precision, compiled)
