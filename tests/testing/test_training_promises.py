"""The promises of training: kept by models and optimizers that are right, and each broken one found, with its cause."""

import copy
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import adamw, attention, block, shake, tiny, tiny_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.optim.schedule import Trapezoid
from blagpt_pl.testing.running import aside, fit, random_batches
from blagpt_pl.testing.training import check_accumulation, check_optimizer, check_resume

CHECKS = {"accumulation": check_accumulation, "resume": check_resume, "optimizer": check_optimizer}


def dropping() -> BlaGPT:
    """Dropout at the embedding, on both branches, and on the attention's weights, where it is a number."""
    return tiny(block=block(dropout=0.2, attention=attention(core=partial(SDPA, dropout=0.2))), dropout=0.2)


def terms() -> BlaGPT:
    """Losses besides the next token's: of the logits, and of the trunk."""
    return tiny(losses=[partial(MultiToken, n=3), partial(ZLoss, weight=1e-3)])


KEPT = {
    "tiny": tiny,
    "dropout": dropping,
    "gpt2": tiny_gpt2,
    "terms": terms,
    "schedule": lambda: tiny(schedule=partial(Trapezoid, warmup=250, warmdown=2000)),
    "short context": lambda: tiny(context=5),
    "compiled elsewhere": lambda: tiny(compile="inductor"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str, check: str) -> None:
    model = KEPT[name]()
    before = copy.deepcopy(model.state_dict())
    assert CHECKS[check](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model._trainer is None and all(p.grad is None for p in model.parameters())


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.02, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
    "adamw": partial(torch.optim.AdamW, lr=5e-3),
    "fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "careful": partial(torch.optim.AdamW, lr=1e-5),
    "adagrad": partial(torch.optim.Adagrad, lr=1e-3),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=2e-3),
    "radam": partial(torch.optim.RAdam, lr=1e-4),
    "adafactor": torch.optim.Adafactor,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torch_optimizers_are_sound(name: str) -> None:
    model = (tiny, tiny_gpt2)[len(name) % 2](optimizer=OPTIMIZERS[name])
    told = check_optimizer(model, clip=1.0)
    assert all(role in told for role in ("matrix", "embedding", "vector"))
    assert check_resume(model)


def test_the_ratio_is_the_rms_of_the_change_over_that_of_the_weights() -> None:
    """Sign descent moves every weight by its learning rate."""

    class Sign(torch.optim.SGD):
        def step(self, closure: Callable) -> Tensor:
            loss = closure()
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    p.data.sub_(p.grad.sign(), alpha=group["lr"])
            return loss

    model = tiny(optimizer=partial(Sign, lr=1e-3))
    for p in model.parameters():  # the moved copy has an RMS of sqrt(0.4² + 0.03²)
        nn.init.constant_(p, 0.4)
    assert check_optimizer(model).startswith("matrix 2.5e-03, embedding 2.5e-03, vector 2.5e-03 of its size a step")


# ---------------------------------------------------------------------- broken on purpose


class Weighs(BlaGPT):
    """Weighs the micro-batches of a step by `weights(i, n)`, and logs them by `logs(i, n)`."""

    weights = logs = staticmethod(lambda i, n: 1 / n)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.optimizers(use_pl_optimizer=False).zero_grad()
        for i, (tokens, targets) in enumerate(zip(*batch, strict=True)):
            total, parts = self.objective(tokens, targets)
            total = total * self.weights(i, len(batch[0]))
            self._window.add("loss", parts["loss"] * self.logs(i, len(batch[0])))
            if i < len(batch[0]) - 1:
                total.backward()
        self._window.steps += 1
        self._lr = {"all": 1.0}
        return total


def variant(base: type, **changes: object) -> Callable[..., BlaGPT]:
    """A class like `base`, with other members, built like `tiny`."""

    def build(**arguments: object) -> BlaGPT:
        model = tiny(**arguments)
        model.__class__ = type("Broken", (base,), {k: staticmethod(v) for k, v in changes.items()})
        return model

    return build


def test_the_harness_of_weights_is_sound() -> None:
    assert check_accumulation(variant(Weighs)())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": lambda i, n: 1.0}, "2 micro-batches of 1, the gradient of"),
        ({"weights": lambda i, n: 1 / (n + 1)}, "1 micro-batch of 2, the gradient of"),
        ({"weights": lambda i, n: 0.5}, "1 micro-batch of 2, the gradient of"),
        ({"weights": lambda i, n: 1 / (i + 1)}, "2 micro-batches of 1, the gradient of"),
        ({"weights": lambda i, n: (1, 1, 0)[i] / min(n, 2)}, "3 micro-batches of 1, the gradient of"),
        ({"logs": lambda i, n: 1.0}, "train/loss is logged as .* in 2 micro-batches of 1, as"),
        ({"logs": lambda i, n: float(i == 0)}, "train/loss is logged as"),
    ],
)
def test_unequal_micro_batches_are_found(changes: dict, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_accumulation(variant(Weighs, **changes)())


class Around(nn.Module):
    """Stands around the last norm and does something to the stream in training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.change(x) if self.training else x


class OwnGenerator(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.generator = torch.Generator().manual_seed(3)

    def change(self, x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=self.generator) > 0.2)


class PythonRandom(Around):
    def change(self, x: Tensor) -> Tensor:
        return x * random.uniform(0.5, 1.5)


class NumpyRandom(Around):
    def change(self, x: Tensor) -> Tensor:
        return x * float(np.random.uniform(0.5, 1.5))


class Running(Around):
    """A running mean of the stream; kept in the checkpoint, or not."""

    persistent = False

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("mean", torch.zeros(()), persistent=self.persistent)

    def change(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().abs().mean(), alpha=0.1)
        return x * (1 + self.mean)


class RunningKept(Running):
    persistent = True


class Counts(Around):
    seen = 0

    def change(self, x: Tensor) -> Tensor:
        self.seen += 1
        return x * (1 + 0.1 * self.seen)


class Grows(Around):
    def change(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(()))
        return x * self.late


def around(kind: type) -> BlaGPT:
    model = tiny()
    model.norm = kind(model.norm)
    return model


def test_a_running_buffer_that_is_saved_is_sound() -> None:
    assert check_resume(around(RunningKept))


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (
            OwnGenerator,
            "state of the model outside its state_dict: a plain attribute, or a random generator of its own",
        ),
        (PythonRandom, "randomness that is no function of the step"),
        (NumpyRandom, "randomness that is no function of the step"),
        (Running, r"buffer norm.mean is no part of the checkpoint \(persistent=False\)"),
        (Counts, "state of the model outside its state_dict"),
    ],
)
def test_state_that_a_checkpoint_misses_is_found(kind: type, cause: str) -> None:
    with pytest.raises(
        AssertionError, match=rf"^parameter .* differs by .* first the loss of step 3.*likely cause: {cause}"
    ):
        check_resume(around(kind))


def test_a_checkpoint_that_cannot_be_read_is_found() -> None:
    with pytest.raises(AssertionError, match="the checkpoint cannot be taken up: CheckpointError: .*norm.late"):
        check_resume(around(Grows))


def test_dropout_that_nobody_seeds_is_found() -> None:
    model = variant(Weighs)(dropout=0.2)
    with pytest.raises(AssertionError, match="randomness that is no function of the step"):
        check_resume(model)


def test_numbers_lost_for_the_log_are_found() -> None:
    model = variant(BlaGPT, on_load_checkpoint=lambda checkpoint: None)()
    with pytest.raises(AssertionError, match="^logged train/loss differs .* several steps, which on_save_checkpoint"):
        check_resume(model)


class Optimizer(torch.optim.SGD):
    """Gradient descent, with a place to go wrong."""

    def __init__(self, params: object, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.begin()

    def begin(self) -> None:
        """Before the first step."""

    def change(self, updates: list[Tensor]) -> list[Tensor]:
        """What becomes of the updates of all parameters."""
        return updates

    def step(self, closure: Callable) -> Tensor:
        loss = closure()
        places = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():
            for (p, _), u in zip(places, self.change([p.grad * lr for p, lr in places]), strict=True):
                p.sub_(u)
        return loss


class Attribute(Optimizer):
    def begin(self) -> None:
        self.steps = 0

    def change(self, updates: list[Tensor]) -> list[Tensor]:
        self.steps += 1
        return [u / self.steps for u in updates]


class Orthogonal(Optimizer):
    """Every update has an RMS of its learning rate; all of them together are clipped to `norm`."""

    norm = float("inf")

    def change(self, updates: list[Tensor]) -> list[Tensor]:
        rate = self.param_groups[0]["lr"]
        updates = [rate * F.normalize(u.flatten(), dim=0).view_as(u) * u.numel() ** 0.5 for u in updates]
        total = torch.stack([u.norm() for u in updates]).norm()
        return [u * min(1.0, self.norm / total.item()) for u in updates]


class ClippedToOne(Orthogonal):
    norm = 0.3


class ClippedToNothing(Orthogonal):
    norm = 1e-6


class EachToNothing(Optimizer):
    """Tensor by tensor, so that company does not matter."""

    def change(self, updates: list[Tensor]) -> list[Tensor]:
        return [1e-5 * self.param_groups[0]["lr"] * u / u.norm() for u in updates]


class Explodes(Optimizer):
    def change(self, updates: list[Tensor]) -> list[Tensor]:
        return [u * float("inf") for u in updates]


class Decays(ClippedToNothing):
    """Decays weights, which is a movement of its own."""

    def __init__(self, params: object) -> None:
        super().__init__([{"weight_decay": 0.1, **group} for group in params])

    def change(self, updates: list[Tensor]) -> list[Tensor]:
        updates = super().change(updates)
        decays = [g["weight_decay"] for g in self.param_groups for p in g["params"] if p.grad is not None]
        return [u + d * p for u, d, p in zip(updates, decays, self.parameters(), strict=True)]

    def parameters(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"] if p.grad is not None]


class SkipsOne(Optimizer):
    def change(self, updates: list[Tensor]) -> list[Tensor]:
        return [0 * updates[0], *updates[1:]]


def test_the_harness_of_optimizers_is_sound() -> None:
    for kind in (Optimizer, Orthogonal):
        assert check_optimizer(tiny(optimizer=kind)) and check_resume(tiny(optimizer=kind))


def test_optimizer_state_that_a_checkpoint_misses_is_found() -> None:
    with pytest.raises(
        AssertionError, match="likely cause: state of the optimizer or of the schedule outside its state"
    ):
        check_resume(tiny(optimizer=Attribute))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (ClippedToOne, "matrix is throttled: a step of all parameters moves .* limits its update as a whole"),
        (ClippedToNothing, "throttled"),
        (Decays, "throttled"),
        (EachToNothing, "matrix is throttled: no step at the full learning rate moves it by more than .* of its size"),
        (Explodes, "the update is not finite"),
        (SkipsOne, r"blocks\.0\..*weight does not move in 8 steps, although it has a gradient"),
        (
            lambda groups: adamw([{**g, "lr": 0.0} if g["role"] == "vector" else g for g in groups]),
            "^vector does not move in 8 steps, although it has gradients: is its learning rate 0",
        ),
        (lambda groups: adamw(groups, lr=1e-9), "is throttled: no step"),
    ],
)
def test_updates_that_are_not_sensible_are_found(optimizer: Callable, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_optimizer(tiny(optimizer=optimizer))


def test_clipping_that_throttles_is_found() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(
        AssertionError, match=r"^trainer.gradient_clip_val=0.001 throttles matrix: it moves by .* without"
    ):
        check_optimizer(tiny(optimizer=sgd), clip=1e-3)
    for optimizer in (adamw, partial(torch.optim.RAdam, lr=1e-3), partial(torch.optim.Adagrad, lr=1e-3)):
        assert "when clipped to 0.001" in check_optimizer(tiny(optimizer=optimizer), clip=1e-3)  # blind to the size


def regrouped(change: Callable[[BlaGPT, torch.optim.Optimizer], None]) -> BlaGPT:
    """A model whose optimizer is changed after it was made."""

    class Regrouped(BlaGPT):
        def make_optimizer(self) -> torch.optim.Optimizer:
            optimizer = super().make_optimizer()
            change(self, optimizer)
            return optimizer

    model = tiny()
    model.__class__ = Regrouped
    return model


def twice(model: BlaGPT, optimizer: torch.optim.Optimizer) -> None:
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"][0])


def freeze(model: BlaGPT, optimizer: torch.optim.Optimizer) -> None:
    model.norm.weight.requires_grad_(False)


def foreign(model: BlaGPT, optimizer: torch.optim.Optimizer) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, o: o.param_groups[2]["params"].pop(), r"the optimizer has no norm\.weight: it is trainable"),
        (twice, r"the optimizer has blocks\.0\..*weight 2 times"),
        (freeze, r"the optimizer has norm\.weight in vector, which is frozen"),
        (foreign, r"has a tensor \(3,\) in group 3, which is no parameter of the model"),
    ],
)
def test_parameters_in_the_wrong_places_are_found(change: Callable, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_optimizer(regrouped(change))


def test_frozen_parameters_that_are_left_alone_are_sound() -> None:
    model = tiny()
    model.embedding.requires_grad_(False)
    assert "embedding" not in check_optimizer(model)
    assert check_resume(model) and check_accumulation(model)


# ---------------------------------------------------------------------- good manners


def test_what_is_found_does_not_depend_on_the_generators_and_leaves_them_alone() -> None:
    model, found = dropping(), []
    for seed in (1, 2):
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        found.append([check(model) for check in CHECKS.values()])
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert (np.random.get_state()[1] == before[2]).all()
    assert found[0] == found[1]


def test_nothing_is_printed_and_no_file_is_left(
    capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for check in CHECKS.values():
        check(shake(tiny()))
    with pytest.raises(AssertionError):
        check_resume(around(PythonRandom))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list and not os.listdir(tmp_path)


def test_a_run_trains_a_copy_in_the_mode_it_is_given() -> None:
    model = dropping()
    with aside():
        runs = [fit(model.train(mode), random_batches(model, 3, 1, 2)) for mode in (True, False)]
    assert [run.lightning_module.training for run in runs] == [True, False] and runs[0].global_step == 3
    assert not any(
        torch.equal(runs[0].callback_metrics[name], runs[1].callback_metrics[name]) for name in ["train/loss"]
    )


class ForgetsState(torch.optim.SGD):
    """Counts its steps where nothing reads them, and begins anew when it is loaded."""

    def step(self, closure: Callable | None = None) -> None:
        super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["count"] = self.state[p].get("count", 0) + 1

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["count"] = 0


class ForgetsGroups(torch.optim.SGD):
    """The same in its groups."""

    def step(self, closure: Callable | None = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["count"] = 0


@pytest.mark.parametrize(
    ("kind", "where"),
    [(ForgetsState, r"optimizer state of [\w.]+ count differs"), (ForgetsGroups, r"optimizer group 0 count differs")],
)
def test_what_an_optimizer_forgets_is_found_even_where_nothing_reads_it(kind: type, where: str) -> None:
    with pytest.raises(AssertionError, match=where):
        check_resume(tiny(optimizer=partial(kind, lr=0.01)))
