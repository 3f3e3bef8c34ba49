"""What a configuration will cost, before it is trained: parameters, FLOPs, memory, time; nothing is allocated for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from blagpt_pl.devices import Device
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.memory import RESERVE, CannotFollow, StepMemory, step_memory
from blagpt_pl.lab.model_of import model_of
from blagpt_pl.lab.module_table import Row, Table, sizes
from blagpt_pl.lab.predict import Prediction, predict, work_of
from blagpt_pl.lab.tiny import tiny_model
from blagpt_pl.lm import LanguageModel
from blagpt_pl.nn.base import Core
from blagpt_pl.nn.flops import CannotCount, Flops, count_flops, told
from blagpt_pl.nn.memory import Budget
from blagpt_pl.testing.certificate import place_of


@dataclass(frozen=True)
class Fact:
    """One line of an account.

    Attributes:
        section: what it is a part of.
        name: its name in the table and, with the section, in the JSON.
        value: a number, None where it is not known.
        unit: "" for a count, else bytes, FLOP, ms, h, share.
        note: what should be known about it.
    """

    section: str
    name: str
    value: float | None
    unit: str = ""
    note: str = ""


class Account:
    """The account of one configuration.

    Args:
        layers: the configuration.
        device: the GPU that memory and time are told for.
    """

    def __init__(self, layers: Layers, device: Device) -> None:
        self.layers, self.device = layers, device
        self.unknown: dict[str, str] = {}
        data, trainer = layers.tree["data"], layers.tree.get("trainer") or {}
        self.context, self.batch, self.device_batch = (
            data[name] for name in ("context", "batch_size", "device_batch_size")
        )
        steps = trainer.get("max_steps")
        self.steps: int | None = steps if steps and steps > 0 else None  # -1 is Lightning's word for no end
        self.precision: str | int = trainer.get("precision") or "32-true"
        self.ranks = ranks_of(trainer)
        self.sharded = any(word in str(trainer.get("strategy", "")).lower() for word in ("fsdp", "modelparallel"))
        with torch.device("meta"):
            self.model: LanguageModel = model_of(layers)
        self.compiled = self.model.backend is not None

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.batch * self.context

    @property
    def micro_batches(self) -> int:
        """Forwards a step, on one device.

        Raises:
            ConfigError: the sizes do not divide.
        """
        if self.device_batch < 1:
            raise ConfigError(f"data.device_batch_size: {self.device_batch} (expected 1 or more)")
        if self.batch % (self.device_batch * self.ranks):
            raise ConfigError(
                f"data.batch_size: {self.batch} does not divide into data.device_batch_size={self.device_batch} on "
                f"{self.ranks} ranks"
            )
        return self.batch // (self.device_batch * self.ranks)

    @cached_property
    def flops(self) -> Flops | None:
        """Of one sequence; None where the model does not run without data (`unknown` then says why)."""
        try:
            return count_flops(self.model, self.context)
        except CannotCount as error:
            self._run_tiny()
            self.unknown["FLOPs"] = str(error)
            return None

    @cached_property
    def flops_run(self) -> Flops | None:
        """Those and what `model.memory` computes again in the backward pass, as far as it is not the compiler's choice."""
        if self.flops is None or self.model.memory is None:
            return self.flops
        with torch.device("meta"):
            model = model_of(self.layers)
        model.apply_memory_policy()
        return count_flops(model, self.context)

    def _run_tiny(self) -> None:
        """Whether the model runs at all, with numbers and at a tiny size.

        Raises:
            ConfigError: it does not.
        """
        model = tiny_model(self.layers)
        tokens = torch.zeros(1, model.context, dtype=torch.int64)
        try:
            model.objective(tokens, tokens)
        except Exception as error:
            raise ConfigError(f"model: does not run: {told(error)}{place_of(error)}") from error

    @property
    def attention_flops(self) -> int:
        """Of those that are run, a token's in the cores of attention."""
        cores = [path for path, module in self.model.named_modules() if isinstance(module, Core)]
        both = (self.flops_run.forward, self.flops_run.backward)
        return sum(of.get(path, 0) for of in both for path in cores) // self.flops.tokens

    @cached_property
    def memory(self) -> StepMemory | None:
        """What a step keeps in memory; None where it cannot be followed (`unknown` then says why)."""
        try:
            found = step_memory(lambda: model_of(self.layers), self.context, self.precision, self.compiled)
            found.peaks(self.device_batch)
        except CannotFollow as error:
            self.unknown["memory"] = str(error)
            return None
        return found

    @cached_property
    def largest_batch(self) -> int:
        """The most sequences a forward that fit on the device."""
        one = self.memory.largest_batch(self.device.memory_bytes, micro_batches=1)
        if one * self.ranks >= self.batch:  # a step is one forward
            return one
        return self.memory.largest_batch(self.device.memory_bytes, micro_batches=2)

    @property
    def largest_that_divides(self) -> int:
        """The largest `device_batch_size` that fits and divides the step, 0 if none does."""
        share = self.batch // self.ranks
        return max(
            (b for b in range(1, self.largest_batch + 1) if self.batch % self.ranks == 0 and share % b == 0), default=0
        )

    @cached_property
    def prediction(self) -> Prediction:
        """How long a step takes.

        Raises:
            ConfigError: the precision is none that is predicted.
        """
        run = self.flops_run.per_token
        work = work_of(self.memory, self.device_batch, self.tokens_per_step, self.ranks, run, self.attention_flops)
        found = predict(work, self.device)
        return replace(
            found, mfu=found.mfu * self.flops.per_token / run
        )  # what is computed again is no work of the model

    def rows(self, depth: int) -> list[Row]:
        """Parameters and FLOPs of the modules."""
        counted: tuple[Mapping, Mapping] = ({}, {}) if self.flops is None else (self.flops.forward, self.flops.backward)
        return Table(self.model, *counted).rows(depth)

    def facts(self) -> Iterator[Fact]:
        """Everything, line by line."""
        yield from self._size()
        yield from self._work()
        yield from self._memory()
        yield from self._run()
        yield from self._time()

    def _size(self) -> Iterator[Fact]:
        n = sizes(self.model, self.model.head)
        yield Fact("parameters", "total", n["total"], note="a shared tensor counts once")
        yield Fact("parameters", "embedding", n["embedding"], note="tables that are looked up")
        yield Fact(
            "parameters", "active", n["active"], note="what one token meets: of tables that are looked up, a row"
        )

    def _work(self) -> Iterator[Fact]:
        if self.flops is None:
            yield Fact("FLOPs a token", "total", None, "FLOP", f"not counted: {self.unknown['FLOPs']}")
            return
        bound = "lower bound" if self.flops.uncounted else ""
        yield Fact("FLOPs a token", "forward", self.flops.forward_per_token, "FLOP", bound)
        yield Fact("FLOPs a token", "backward", self.flops.backward_per_token, "FLOP", bound)
        yield Fact("FLOPs a token", "total", self.flops.per_token, "FLOP", bound)
        if self.model.memory is not None:
            again = self.flops_run.per_token - self.flops.per_token
            chosen = isinstance(self.model.memory, Budget)
            note = "not counted: what is computed again is the compiler's choice" if chosen else "not in the total"
            yield Fact("FLOPs a token", "computed again", None if chosen else again, "FLOP", note)
        for name, times in self.flops.uncounted.items():
            yield Fact("FLOPs a token", f"not counted: {name}", times, "times")

    def _memory(self) -> Iterator[Fact]:
        micro = self.micro_batches
        if self.memory is None:
            yield Fact(MEMORY, "total", None, "bytes", f"not estimated: {self.unknown['memory']}")
            return
        for name, value in self.memory.at(self.device_batch, micro).items():
            bound = "lower bound" if name in ("optimizer", "total") and self.memory.lower_bound else ""
            if name == "total" and self.sharded:
                bound = "upper bound: nothing is sharded here, as the strategy would"
            yield Fact(MEMORY, name, value, "bytes", bound)

    def _run(self) -> Iterator[Fact]:
        yield Fact("run", "tokens a step", self.tokens_per_step)
        if self.steps is None:
            yield Fact("run", "steps", None, note="not known: trainer.max_steps says no number")
            return
        tokens = self.steps * self.tokens_per_step
        yield Fact("run", "steps", self.steps)
        yield Fact("run", "tokens", tokens)
        yield Fact("run", "tokens a parameter", tokens / sizes(self.model, self.model.head)["total"], "ratio")
        if self.flops is not None:
            bound = "lower bound; " if self.flops.uncounted else ""
            yield Fact("run", "FLOPs", tokens * self.flops.per_token, "FLOP", f"{bound}training alone")

    def _time(self) -> Iterator[Fact]:
        section = f"on {self.device.name}"
        if self.memory is None:
            yield Fact(section, "largest device_batch_size", None, note="not estimated: memory is not")
            yield Fact(section, "step", None, "ms", "not predicted: memory is not estimated")
            return
        yield Fact(
            section,
            "largest device_batch_size",
            self.largest_batch,
            note=f"{'upper bound; ' if self.memory.lower_bound else ''}{RESERVE:.0%} of the memory left alone",
        )
        yield Fact(section, "... that divides batch_size", self.largest_that_divides)
        try:
            if self.flops is None:
                raise ConfigError("FLOPs are not counted")
            step = self.prediction
        except ConfigError as error:
            yield Fact(section, "step", None, "ms", f"not predicted: {error}")
            return
        more = self.flops.uncounted or self.memory.lower_bound or isinstance(self.model.memory, Budget)
        bound = "lower bound; " if more else ""
        said = f"{bound}prediction; no run of ours has confirmed it"
        yield Fact(section, "step", step.step_ms, "ms", said)
        yield Fact(section, "tokens a second", step.tokens_per_s)
        yield Fact(section, "MFU", step.mfu, "share", "of the vendor's dense bf16 peak")
        if self.steps is not None:
            yield Fact(section, "run", self.steps * step.step_ms / 3.6e6, "h", "without validation")


MEMORY = "memory of a step"


def ranks_of(trainer: Mapping[str, Any]) -> int:
    """Devices of a run, 1 where the configuration leaves it to the machine."""
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes") or 1
    listed = devices if isinstance(devices, list) else [d for d in str(devices).split(",") if d.strip()]  # "0,1"
    each = int(devices) if str(devices).isdigit() else len(listed)
    return max(each, 1) * nodes
