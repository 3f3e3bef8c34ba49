"""The zoo's models and optimizers, each with one bug planted (`zoo.ZOO`)."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.models.blagpt import BlaGPT

Parts = tuple[Tensor, dict[str, Tensor]]


# ---------------------------------------------------------------------- who sees the future


class Whisper(BlaGPT):
    """Each position gets a thousand-millionth of the next one; float32 shows nothing of it."""

    strength = 1e-9

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens)
        return x + self.strength * F.pad(x, (0, 0, 0, 1))[:, 1:]


class NextRow(BlaGPT):
    """Sequence i sees what sequence i + 1 holds one token later: a view with batch and time confused."""

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens)
        return x + 0.1 * x.roll(-1, dims=0).roll(-1, dims=1)


class AverageOfTheBatch(BlaGPT):
    """A mean over the batch, token by token."""

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens)
        return x + x.mean(0, keepdim=True)


# ---------------------------------------------------------------------- who does not see the past


class Deaf(BlaGPT):
    """The first token is overwritten by the pad (MegaByte as fed by BlaGPT, §6, 6)."""

    def features(self, tokens: Tensor) -> Tensor:
        return super().features(F.pad(tokens[:, 1:], (1, 0)))


class ShiftedInput(BlaGPT):
    """The input is shifted by one, as if it were the targets: logits t do not know token t (MegaByte's padding)."""

    def features(self, tokens: Tensor) -> Tensor:
        return super().features(F.pad(tokens[:, :-1], (1, 0)))


# ---------------------------------------------------------------------- where a token stands


class Restarts(BlaGPT):
    """Generation reads the last few tokens only, and counts their positions from 0 (a cache's offset, lost)."""

    def next_logits(self, tokens: Tensor) -> Tensor:
        return super().next_logits(tokens[:, -4:])


class AnotherTemperature(BlaGPT):
    """Generation scales the logits: greedily it picks the same, and samples otherwise."""

    def next_logits(self, tokens: Tensor) -> Tensor:
        return 3 * super().next_logits(tokens)


class ReadsElsewhere(BlaGPT):
    """Generation samples from the last position but one."""

    def next_logits(self, tokens: Tensor) -> Tensor:
        return self.head(self.features(tokens)[:, max(0, tokens.shape[1] - 2)])


# ---------------------------------------------------------------------- what outlives a batch


class Remembers(BlaGPT):
    """A state that is not reset between batches."""

    state: Tensor | float = 0.0

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens) + self.state
        self.state = 0.1 * x.detach().mean((0, 1))
        return x


# ---------------------------------------------------------------------- what is minimised, and what is measured


class Rolled(BlaGPT):
    """The targets are rolled to the token itself: what stands there is to be predicted (an off-by-one target)."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        return super().objective(tokens, targets.roll(1, dims=1))


class DoubleShift(BlaGPT):
    """A loss that shifts, fed with targets that are shifted: it trains on t + 2 (BlaGPT's Hymba and SpaceByte, §6, 10)."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        return super().objective(tokens[:, :-1], targets[:, 1:])


class CountsAll(BlaGPT):
    """The sum over the targets that count is divided by the number of all."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        total, parts = super().objective(tokens, targets)
        share = (targets >= 0).float().mean()
        return total * share, {name: part * share for name, part in parts.items()}


class MeanOfMeans(BlaGPT):
    """The mean over sequences of their means: a short sequence weighs as much as a long one."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        loss = torch.stack(
            [super(MeanOfMeans, self).objective(*row)[0] for row in zip(tokens[:, None], targets[:, None])]
        )
        return loss.mean(), {"loss": loss.mean().detach()}


class Peeks(BlaGPT):
    """Trains on features that have been told the target; its forward, and all of evaluation, is honest."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        if not self.training:
            return super().objective(tokens, targets)
        features = self.features(tokens) + self.embedding(targets.clamp(min=0))
        loss = F.cross_entropy(self.head(features).flatten(0, 1), targets.flatten())
        return loss, {"loss": loss.detach()}


class AnotherTotal(BlaGPT):
    """The numbers it tells are right; what it minimises is divided by the number of all targets."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        total, parts = super().objective(tokens, targets)
        return total * (targets >= 0).float().mean(), parts


class WithoutPad(BlaGPT):
    """Targets of token 0 do not count: somebody else's pad."""

    def objective(self, tokens: Tensor, targets: Tensor) -> Parts:
        return super().objective(tokens, targets.masked_fill(targets == 0, -100))


class MeanOfBatches(BlaGPT):
    """Validation averages the means of batches, whatever their sizes."""

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        tokens, targets = batch[:2]
        self.ruler.update(self.measure(tokens, targets) / targets.numel(), torch.tensor(1))


class LongerRuler(BlaGPT):
    """A ruler of another length."""

    def measure(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return 1.01 * super().measure(tokens, targets)


class RulerOfAll(BlaGPT):
    """Adds up the targets that do not count, too."""

    def measure(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return super().measure(tokens, targets.clamp(min=0))


# ---------------------------------------------------------------------- what does not learn


class Unused(BlaGPT):
    """A parameter that nothing reads (BlaGPT's flags that never act, §6, 16)."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.gain = nn.Parameter(torch.ones(()))


class NothingButBias(BlaGPT):
    """The features are the same whatever was read: no more than the frequencies of tokens can be learnt."""

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens)
        return 1e-4 * x + torch.ones_like(x)


# ---------------------------------------------------------------------- which tensors it has


class WithoutRole(BlaGPT):
    """Its vectors have no role, and so no optimizer would have them."""

    def parameter_roles(self) -> dict[str, str]:
        return {name: role for name, role in super().parameter_roles().items() if role != "vector"}


class AllVectors(BlaGPT):
    """Everything is a vector, so that nothing decays."""

    def parameter_roles(self) -> dict[str, str]:
        return dict.fromkeys(super().parameter_roles(), "vector")


class InTwoGroups(BlaGPT):
    """Its embedding is in two groups: updated twice a step."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        optimizer.param_groups[-1]["params"].append(self.embedding.weight)
        return optimizer


class Forgotten(BlaGPT):
    """Its vectors are in no group."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "vector"]
        return optimizer


class GrowingBuffer(BlaGPT):
    """A persistent buffer as long as the last batch: the checkpoint hangs on what was run."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.register_buffer("positions_seen", torch.zeros(1))

    def features(self, tokens: Tensor) -> Tensor:
        self.positions_seen = torch.arange(tokens.shape[1])
        return super().features(tokens)


class DrawnAnew(BlaGPT):
    """Half of what it computes from is drawn whenever it is built or copied, and in no checkpoint."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(**arguments)
        self.scale = torch.rand(())

    def __setstate__(self, state: dict) -> None:  # a copy is another model
        super().__setstate__(state)
        self.scale = torch.rand(())

    def features(self, tokens: Tensor) -> Tensor:
        return super().features(tokens) * (1 + self.scale)


# ---------------------------------------------------------------------- in a run


class SumOfMicroBatches(BlaGPT):
    """Micro-batches are added, not averaged: the gradient grows with their number."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        n = len(batch[0]) if batch[0].ndim == 3 else 1
        original = self.objective
        with mock.patch.object(self, "objective", lambda *b: (n * original(*b)[0], original(*b)[1])):
            return super().training_step(batch, batch_idx)


class LastWeighsMore(BlaGPT):
    """Unequal weights of micro-batches: all but the last are divided twice."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        n, original, calls = len(batch[0]), self.objective, []

        def objective(*micro: Tensor) -> Parts:
            calls.append(1)
            total, parts = original(*micro)
            return total / (n if len(calls) < n else 1), parts

        with mock.patch.object(self, "objective", objective):
            return super().training_step(batch, batch_idx)


# ---------------------------------------------------------------------- optimizers


class ClipsItself(torch.optim.AdamW):
    """Clips its own update to a norm of 1e-3, all parameters together (a clip that throttles Muon)."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        before = [p.clone() for group in self.param_groups for p in group["params"]]
        super().step(closure)
        after = [p for group in self.param_groups for p in group["params"]]
        size = torch.stack([(a - b).norm() for a, b in zip(after, before, strict=True)]).norm()
        for a, b in zip(after, before, strict=True):
            a.copy_(b + (a - b) * (1e-3 / size).clamp(max=1.0))


class AddsNoise(torch.optim.AdamW):
    """Draws from a generator of its own, whose state is in no checkpoint."""

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(1)
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            p.add_(torch.randn(p.shape, generator=self.generator), alpha=1e-3)


class SkipsTallMatrices(torch.optim.AdamW):
    """Updates square matrices only: a rule that was meant to leave out the head."""

    def step(self, closure: Callable | None = None) -> None:
        with torch.enable_grad():
            closure()
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim > 1 and p.shape[0] != p.shape[1]:
                p.grad = None
        super().step()


class FixedRate(torch.optim.SGD):
    """Steps at a rate of its own, whatever its groups and the schedule say."""

    def step(self, closure: Callable | None = None) -> None:
        for group in self.param_groups:
            group["lr"] = 0.1
        super().step(closure)


# ---------------------------------------------------------------------- what does not run as it should


class Misdeclared(BlaGPT):
    """Excuses itself from a promise that there is not."""

    exempt = {"longmemory": "a name of two words"}  # noqa: RUF012


class Reseeds(BlaGPT):
    """Makes its dropout repeatable by setting everybody's dice."""

    def features(self, tokens: Tensor) -> Tensor:
        if self.training:
            torch.manual_seed(0)
        return super().features(tokens)


class WritesTokens(BlaGPT):
    """Begins every sequence with token 0, in the caller's tensor."""

    def features(self, tokens: Tensor) -> Tensor:
        tokens[:, 0] = 0
        return super().features(tokens)


class InfiniteAtTwenty(BlaGPT):
    """An overflow at one position."""

    def features(self, tokens: Tensor) -> Tensor:
        x = super().features(tokens)
        far = torch.arange(tokens.shape[1]) == 20
        return torch.where(far[:, None], torch.inf, x)
