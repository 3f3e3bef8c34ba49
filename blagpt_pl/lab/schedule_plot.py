"""A configuration's learning rate over its run: a small picture, a line, or plain data."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from blagpt_pl.lab.account import Account
from blagpt_pl.lab.describe_table import NUMBER
from blagpt_pl.lab.explain import explained, refusals
from blagpt_pl.optim.schedule import Schedule

WIDE, HIGH = 60, 6  # characters
BLOCKS = " ▁▂▃▄▅▆▇█"
SAMPLES = 61  # of the data


@dataclass(frozen=True)
class Rates:
    """The learning rates of a run.

    Attributes:
        kind: the schedule's class.
        options: its values, those that nobody has said among them where the schedule could be built.
        schedule: the schedule, None where the length of the run is not known.
        steps: length of the run.
        peaks: of each parameter group, what it is and the learning rate that the schedule's factor multiplies.
    """

    kind: str
    options: dict[str, Any]
    schedule: Schedule | None
    steps: int | None
    peaks: list[tuple[str, float]]

    def samples(self, count: int) -> list[tuple[int, float]]:
        """Steps from the first to the last, evenly apart, and the factor of each; all steps if there are no more."""
        if self.schedule is None:
            return []
        apart = (self.steps - 1) / (count - 1)
        steps = dict.fromkeys(round(i * apart) for i in range(count))
        return [(step, self.schedule.factor(step)) for step in steps]

    @cached_property
    def by_rate(self) -> dict[float, list[str]]:
        """Which groups have a learning rate."""
        found: dict[float, list[str]] = {}
        for role, rate in self.peaks:
            found.setdefault(rate, []).append(role)
        return found

    @property
    def shape(self) -> str:
        """The schedule and its values."""
        options = ", ".join(map(self._option, self.options))
        return f"{self.kind} ({options})" if options else self.kind

    @property
    def told(self) -> str:
        """Each learning rate at its peak, and the groups that have it where there are several."""
        if len(self.by_rate) == 1:
            return f"{next(iter(self.by_rate)):g}"
        return "; ".join(f"{', '.join(dict.fromkeys(roles))} {rate:g}" for rate, roles in self.by_rate.items())

    def _option(self, name: str) -> str:
        value, resolved = self.options[name], getattr(self.schedule, name, None)
        is_fraction = isinstance(value, float) and isinstance(resolved, int)
        return f"{name} {value}" + (f" = {resolved:,} steps" if is_fraction else "")


def rates_of(account: Account) -> Rates:
    """The learning rates of a configuration.

    Raises:
        ConfigError: the schedule does not fit in the run, or the optimizer refuses the groups of the model.
    """
    tree, model = account.layers.tree, account.model
    part = (tree["model"].get("init_args") or {}).get("schedule", "-") if isinstance(tree["model"], dict) else "-"
    said = part if isinstance(part, dict) else {"class_path": part}
    kind, options = said["class_path"].rpartition(".")[2], dict(said.get("init_args") or {})
    schedule = None
    with explained(account.layers), refusals():
        if account.steps is not None:
            trial = (tree.get("trainer") or {}).get("fast_dev_run", False)
            schedule = model.configure_schedule(SimpleNamespace(fast_dev_run=trial, max_steps=account.steps))
            options = options if kind == type(schedule).__name__ else {}
            kind, options = type(schedule).__name__, _complete(type(schedule), options)
        groups = model.make_optimizer().param_groups
    peaks = [(group.get("role", "all"), float(group["lr"])) for group in groups]
    return Rates(kind, options, schedule, account.steps, peaks)


def _complete(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """What has been said, and the defaults of what has not, in the order of the signature."""
    defaults = {name: p.default for name, p in inspect.signature(kind).parameters.items()}
    known = {name: options.get(name, default) for name, default in defaults.items()}
    return {name: value for name, value in known.items() if value is not inspect.Parameter.empty}


def picture(factors: Sequence[float], high: int) -> list[str]:
    """Bars of `high` lines, 1 as high as the picture unless a factor is higher; what is not 0 is seen."""
    top = max(1.0, *factors)
    eighths = [max(round(8 * high * f / top), int(f > 0)) for f in factors]
    return ["".join(BLOCKS[min(max(n - 8 * row, 0), 8)] for n in eighths) for row in reversed(range(high))]


def columns(rates: Rates, wide: int) -> list[float]:
    """The factors that `wide` columns show; a short run's stand several times."""
    last = rates.steps - 1
    return [rates.schedule.factor(round(i * last / (wide - 1))) for i in range(wide)]


def plot(rates: Rates) -> list[str]:
    """The learning rate over the run, as a section of a page."""
    lines = ["", f"learning rate, {rates.shape}"]
    if rates.schedule is None:
        return [*lines, f"  {'schedule':<28}{'-':>{NUMBER}}  not known: trainer.max_steps says no number"]
    factors = columns(rates, WIDE)
    several = len(rates.by_rate) > 1
    top = max(1.0, *factors)
    peak = "peak" if several else rates.told
    labels = [peak if top == 1 else f"{top:g} x {peak}", *[""] * (HIGH - 1)]
    for label, bars in zip(labels, picture(factors, HIGH), strict=True):
        lines.append(f"  {label:>10} |{bars}".rstrip())
    last = f"step {rates.steps - 1:,}"
    lines.append(f"  {'0':>10} +{'-' * WIDE}")
    lines.append(f"  {'':>10}  {'step 0':<{WIDE - len(last)}}{last}")
    return [*lines, f"  {'peak':>10}  {rates.told}"] if several else lines


def line(name: str, rates: Rates) -> str:
    """The same in one line."""
    bars = "-" if rates.schedule is None else picture(columns(rates, WIDE // 3), 1)[0]
    return f"{name}: learning rate {rates.told}, {rates.shape}  {bars}".rstrip()


def data(rates: Rates) -> dict[str, Any]:
    """The same for machines."""
    samples = rates.samples(SAMPLES)
    return {
        "class": rates.kind,
        "options": rates.options,
        "total_steps": rates.steps,
        "peaks": [{"role": role, "lr": rate} for role, rate in rates.peaks],
        "steps": [step for step, _ in samples],
        "factors": [factor for _, factor in samples],
    }
