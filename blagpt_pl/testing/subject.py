"""A model under examination, and what its promises are read from."""

import copy
import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.testing.promises import LENGTHS, noisy

LONGEST = (47, 48)  # tokens; prime, as the others are, and a multiple of most chunks: a fast path of its own
LEARNT = 0.05  # nats at which a batch counts as learnt by heart


def random_tokens(model: nn.Module, *shape: int) -> Tensor:
    """Uniform random tokens on the model's device."""
    return torch.randint(model.vocab_size, shape, device=next(model.parameters()).device)


def mean_loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of `forward`'s logits: what `objective` must agree with."""
    return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def train(model: nn.Module, steps: int, batch: Callable[[], Tensor], until: float = -math.inf) -> list[float]:
    """Minimise the whole objective on batches (B, T + 1) by AdamW; the next-token loss of each step.

    Args:
        model: trained in place, in the mode it is in.
        steps: at most so many.
        batch: called anew for every step.
        until: stop at a loss below it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    while len(losses) < steps and not (losses and losses[-1] < until):
        tokens = batch()
        optimizer.zero_grad()
        total, parts = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    return losses


class Subject:
    """A model under examination; it is copied, never changed.

    Args:
        model: a `LanguageModel`, freshly built.
        init_tolerance: how far the first loss may lie from ln V.
        idle: names of parameters that rightly receive no gradient, besides those that their modules declare.
        clip: the norm that the run clips gradients to (`trainer.gradient_clip_val`), if it does.
        described: the number of parameters that was announced for it, if one was.
        rebuild: builds the same model anew, from whatever the generator holds; a copy serves where it is not given.
    """

    def __init__(
        self,
        model: nn.Module,
        init_tolerance: float = 0.15,
        idle: Mapping[str, str] | None = None,
        clip: float | None = None,
        described: int | None = None,
        rebuild: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.init_tolerance = init_tolerance
        self.idle = {**declared_idle(model), **(idle or {})}
        self.exempt = {k: reason for m in model.modules() for k, reason in getattr(m, "exempt", {}).items()}
        self.clip = clip
        self.described = described
        self.rebuild = rebuild or (lambda: noisy(model))
        self.name = type(model).__name__
        self.uniform = math.log(model.vocab_size)
        self.lengths = sorted({min(n, model.context) for n in (*LENGTHS, *LONGEST)})

    def fresh(self, training: bool = False) -> nn.Module:
        """A copy as it was built."""
        return copy.deepcopy(self.model).train(training)

    @cached_property
    def moved(self) -> nn.Module:
        """A copy whose parameters are off their start, which hides much; a promise may change its mode, nothing else."""
        with torch.random.fork_rng():
            torch.manual_seed(1)  # whoever asks first
            return noisy(self.model)

    @cached_property
    def exact(self) -> nn.Module:
        """The same in float64, where a leak of any size stands out from rounding."""
        return copy.deepcopy(self.moved).double()

    def still(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The model's forward, whose buffers stand as they stood before: what a forward in training counts does not add up."""
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def run(tokens: Tensor) -> Tensor:
            logits = model(tokens)
            put_back(model, buffers)
            return logits

        return run

    @cached_property
    def overfitted(self) -> tuple[nn.Module, list[float]]:
        """A copy trained on two sequences until it knows them by heart, dropout off, and its losses."""
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model, tokens = self.fresh(), self.tokens(2, self.length)
            return model, train(model, 300, lambda: tokens, until=LEARNT)

    @property
    def length(self) -> int:
        """Tokens of a sequence where one length will do."""
        return self.lengths[min(1, len(self.lengths) - 1)]

    def tokens(self, *shape: int) -> Tensor:
        """Uniform random tokens."""
        return random_tokens(self.model, *shape)


@torch.no_grad()
def put_back(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set buffers to what they were."""
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def declared_idle(model: nn.Module) -> dict[str, str]:
    """Parameters that rightly receive no gradient, each with the reason: what modules declare as `idle`, name → reason."""
    found = {}
    for path, module in model.named_modules():
        for name, reason in getattr(module, "idle", {}).items():
            found[f"{path}.{name}".lstrip(".")] = reason
    return found
