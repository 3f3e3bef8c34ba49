"""One training step of a model without a Trainer: what `blagpt bench step`, `peers` and `scaling` time.

Step       clear the gradients, the objective under the Trainer's own precision plugin, backward, the optimizer's step; on
           one batch of random tokens that is on the device already
Memory     weights, buffers and the optimizer's state, and the most that a step has allocated beyond them
Small      a configuration for two cores: width and depth in proportion, a shorter vocabulary, one configured context of
           tokens. Its parts stay, and their sizes of text, too (`lab/tiny.py` makes a model that is all overhead)
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blagpt_pl.devices import device_of
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.leading_files import leading_files
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.lab.peak import MIB, peak_mib
from blagpt_pl.lab.sizes import measured, parts_in
from blagpt_pl.lab.smaller import Sizes, each, flat
from blagpt_pl.lab.timing import spread
from blagpt_pl.lab.tiny import Scale, shrunk
from blagpt_pl.lm import LanguageModel
from blagpt_pl.nn.base import count
from blagpt_pl.optim.account import state_tensors

GRAPHS = 256  # of one piece of code, for all configurations side by side; torch's limit is for one model

# ---------------------------------------------------------------------- configurations


def configurations(words: list[str]) -> list[tuple[str, Layers]]:
    """The configurations that a command line names, each with a short name; as `blagpt describe` takes them.

    Raises:
        ConfigError: no configuration is named, or one twice, or it is wrong.
    """
    named, rest = leading_files(words)
    if twice := [name for i, (name, _) in enumerate(named) if name in {n for n, _ in named[:i]}]:
        raise ConfigError(f"{twice[0]}: named twice")
    found = [(word, layers_for([*layers, *rest])) for word, layers in named or [("", [])]]
    short = ["+".join(Path(file).stem for file in layers.files) for _, layers in found]
    return [(s if short.count(s) == 1 else word, one) for s, (word, one) in zip(short, found, strict=True)]


def one_configuration(words: list[str]) -> tuple[str, Layers]:
    """The only one that a command line names.

    Raises:
        ConfigError: it names several, or as for `configurations`.
    """
    first, *others = configurations(words)
    if others:
        raise ConfigError(f"{others[0][0]}: a second configuration (expected one); fix: join overlays by +")
    return first


def batch_of(tree: dict, small_tokens: int | None, asked: int | None = None) -> int:
    """B, sequences of a step: as asked; else a small step's tokens in sequences; else what the configuration says.

    Raises:
        ConfigError: less than one is asked for.
    """
    if asked is not None and asked < 1:
        raise ConfigError(f"--device-batch-size: {asked} (expected 1 or more)")
    data = tree["data"]
    return asked or (data["device_batch_size"] if small_tokens is None else max(1, small_tokens // data["context"]))


def precision_of(layers: Layers, is_small: bool, asked: str | None = None) -> str | int:
    """As asked; else float32 for a small step; else what the configuration says."""
    return asked or ("32-true" if is_small else layers.tree.get("trainer", {}).get("precision", "32-true"))


@dataclass(frozen=True)
class Share(Scale):
    """The rules of another size: widths and heads in proportion to the stream, blocks likewise, a vocabulary at most.

    Attributes:
        vocabulary: V, at most.
    """

    vocabulary: int = 2**31

    def of(self, part: object) -> Sizes:
        """The sizes of a part; those that stay are left out."""
        before, after = measured(part), {}
        (d, new_d), (n, new_n) = self.d_model, self.n_layers
        for measure, sizes in before.items():
            match measure:
                case "width":
                    after |= each(sizes, lambda w: new_d if w == d else max(2, 2 * round(w * new_d / d / 2)))
                case "head":
                    after |= each(sizes, lambda k: max(4, 2 * round(k * new_d / d / 2)))
                case "layers":
                    after |= each(sizes, lambda blocks: max(1, round(blocks * new_n / n)))
                case "vocabulary":
                    after |= each(sizes, lambda v: min(v, self.vocabulary))
        said = {name: size for sizes in before.values() for name, size in sizes.items()}
        return {name: size for name, size in after.items() if size != said[name]}


def of_size(tree: dict, width: float, depth: float, vocabulary: int = 2**31) -> dict:
    """A configuration with its width and depth times these factors; the heads go into the width evenly.

    Args:
        tree: all layers merged; left as it is.
        width, depth: of the stream, and number of blocks, over what they are.
        vocabulary: V, at most.

    Raises:
        ConfigError: the model does not say what its width or its depth is.
    """
    own = measured(tree["model"])
    d, n = (next(iter(flat(own.get(measure, {}))), 0) for measure in ("width", "layers"))
    if not d or not n:
        raise ConfigError("--size: the model does not say which of its values are width and layers (expected `sizes`)")
    heads = [h for part in parts_in(tree["model"]) for h in flat(measured(part).get("heads", {}))]
    common = math.lcm(*heads)
    unit = next(u * common for u in (8, 4, 2, 1) if d % (u * common) == 0 or u == 1)
    new_d = d if width == 1 else unit * max(1, round(d * width / unit))
    scale = Share((d, new_d), (n, max(1, round(n * depth))), 0, vocabulary)
    return {**copy.deepcopy(tree), "model": shrunk(copy.deepcopy(tree["model"]), scale)}


def small(tree: dict) -> dict:
    """A configuration for two cores: at most 192 wide, 4 blocks and a vocabulary of 8192; a smaller one stays."""
    own = measured(tree["model"])
    d, n = (next(iter(flat(own.get(measure, {}))), 1) for measure in ("width", "layers"))
    return of_size(tree, min(1.0, 192 / d), min(1.0, 4 / n), 8192)


def compiled_by(tree: dict, backend: str | None) -> dict:
    """A configuration whose model is compiled by this backend, `none` for eager; None leaves it as it is."""
    if backend is None:
        return tree
    model = tree["model"] if isinstance(tree["model"], dict) else {"class_path": tree["model"]}
    values = {**(model.get("init_args") or {}), "compile": None if backend == "none" else backend}
    return {**tree, "model": {**model, "init_args": values}}


def backend_of(tree: dict) -> str:
    """What compiles the model of a configuration, in a word."""
    values = (tree["model"].get("init_args") or {}) if isinstance(tree["model"], dict) else {}
    return values.get("compile") or "eager"


# ---------------------------------------------------------------------- a step


def precision_plugin(precision: str | int | None, device: torch.device) -> L.pytorch.plugins.precision.Precision:
    """What the Trainer would convert weights and cast operations with.

    Raises:
        ConfigError: it scales the loss, which a step here does not.
    """
    if str(precision) in ("16", "16-mixed"):
        raise ConfigError(f"precision: {precision} scales the loss (expected bf16-mixed, bf16-true or 32-true)")
    where = {"accelerator": device.type, "devices": [device.index or 0] if device.type == "cuda" else 1}
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**where, **off, precision=precision).precision_plugin


def random_batch(vocab_size: int, batch: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T): the same for the same sizes, whoever asks."""
    dice = torch.Generator().manual_seed(0)
    text = torch.randint(vocab_size, (batch, context + 1), generator=dice)
    return text[:, :-1].to(device).contiguous(), text[:, 1:].to(device).contiguous()


def training_step(
    loss: Callable[[], Tensor], optimizer: Optimizer, context: Callable[[], AbstractContextManager]
) -> Callable[[], Tensor]:
    """A function that takes one step and returns the loss from before it."""

    def step() -> Tensor:
        optimizer.zero_grad()
        with context():
            total = loss()
        total.backward()
        optimizer.step()
        return total.detach()

    return step


def state_mib(module: nn.Module, optimizer: Optimizer) -> float:
    """MiB that stay between two steps: weights, buffers and the optimizer's state, without gradients."""
    kept = [*module.parameters(), *module.buffers()]
    kept += state_tensors(optimizer)
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in kept}.values()) / MIB


@dataclass
class Stepper:
    """A model in training.

    Attributes:
        name: what it is called in the table.
        step: takes one training step.
        tokens: of a step.
        parameters: how many.
        flops: of a token, forward and backward; None where not all of it can be counted.
        first_s: seconds of the first step, compilation included.
        peak_mib: the most memory of a step, weights and optimizer included.
        size: `B x T`.
    """

    name: str
    step: Callable[[], object]
    tokens: int
    parameters: int
    flops: int | None = None
    first_s: float = 0.0
    peak_mib: float = 0.0
    size: str = ""

    def numbers(self, times_ms: Sequence[float], device: torch.device) -> dict:
        """What a row says of it."""
        row = spread(times_ms)
        rate = self.tokens / row["median_ms"] * 1e3
        known = device_of(device)
        work = None if self.flops is None else rate * self.flops
        return {
            "name": self.name, "size": self.size, "tokens": self.tokens, "parameters": self.parameters,
            "flops_per_token": self.flops, **row, "tokens_per_s": rate, "us_per_token": 1e6 / rate,
            "tflops": None if work is None else work / 1e12,
            "mfu": None if work is None or known is None else work / known.bf16_flops,
            "peak_mib": self.peak_mib, "first_s": self.first_s,
        }  # fmt: skip


def started(
    name: str,
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    batch: tuple[Tensor, Tensor],
    context: Callable[[], AbstractContextManager],
    flops: int | None = None,
) -> Stepper:
    """A model that has taken its first steps: one that is timed alone, and one whose memory is measured.

    Args:
        name: what it is called in the table.
        module: on its device, in training mode; holds all weights.
        loss: tokens and targets (B, T) -> what is differentiated.
        optimizer: of the module's parameters.
        batch: tokens and targets.
        context: what the loss runs within.
        flops: of a token.
    """
    device = batch[0].device
    step = training_step(lambda: loss(*batch), optimizer, context)
    start = time.perf_counter()
    step()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    first_s = time.perf_counter() - start
    optimizer.zero_grad()
    peak = state_mib(module, optimizer) + peak_mib(step, device)
    b, t = batch[0].shape
    return Stepper(name, step, b * t, count(module.parameters()), flops, first_s, peak, f"{b} x {t}")


def of_configuration(
    name: str, layers: Layers, tree: dict, device: torch.device, batch: int, precision: str | int | None
) -> Stepper:
    """The model of a configuration, compiled and with its optimizer as the configuration says, started.

    Args:
        name: what it is called in the table.
        layers: what has been said.
        tree: what is built.
        device: where it trains.
        batch: B, sequences of a step.
        precision: as `trainer.precision`.
    """
    torch.manual_seed(0)
    plugin = precision_plugin(precision, device)
    model: LanguageModel = plugin.convert_module(model_of(layers, tree).to(device)).train()
    flops = model.flops_per_token()
    model.configure_model()
    optimizer = model.make_optimizer()
    data = random_batch(model.vocab_size, batch, model.context, device)
    return started(
        name, model, lambda x, y: model.objective(x, y)[0], optimizer, data, plugin.train_step_context, flops
    )


def many_graphs() -> AbstractContextManager:
    """Within it, torch keeps the graphs of all configurations; its own limit would refuse the ninth."""
    return torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=GRAPHS)


def peak_note(device: torch.device) -> str:
    """What the MFU of a table refers to."""
    known = device_of(device)
    if known is None:
        return "MFU: no peak of this device is known"
    return f"MFU: causal FLOPs a token, against {known.bf16_flops / 1e12:,.1f} TFLOP/s dense bf16 ({known.name}, data sheet)"
