"""What every shipped optimizer must do: learn at its own learning rate, keep off the gradients, resume to the bit, tell its values."""

import io
import math
from collections import Counter

import pytest
import torch
from helpers import tiny_gpt2
from overlays import NAMES, bytes_of_text, factory, model
from torch import Tensor
from torch.optim import Optimizer

from blagpt_pl.errors import ConfigError
from blagpt_pl.lm import LanguageModel
from blagpt_pl.optim.account import groups_told
from blagpt_pl.optim.composite import Composite
from blagpt_pl.optim.schedule import Trapezoid
from blagpt_pl.seeding import reseed

SHARED = {"vocab_size": 256, "context": 64}


def batches(steps: int, rows: int = 8) -> Tensor:
    """(steps, rows, 65) tokens from random places of the text."""
    text, dice = bytes_of_text(), torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - 65, (steps, rows, 1), generator=dice)
    return text[starts + torch.arange(65)]


class Training:
    """Steps of a model as `LanguageModel` takes them: seeded by the step, on a schedule."""

    def __init__(self, lm: LanguageModel, total: int = 30, reuse: bool = False) -> None:
        self.lm, self.reuse, self.step_number = lm, reuse, 0
        self.optimizer = lm.make_optimizer()
        self.schedule = Trapezoid(total, warmup=3, warmdown=5).on(self.optimizer)
        self.losses: list[float] = []

    def step(self, tokens: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=not self.reuse)
        loss, _ = self.lm.objective(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        reseed(0, self.step_number)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(float(loss.detach()))
        self.step_number += 1

    def saved(self) -> bytes:
        file = io.BytesIO()
        state = {"model": self.lm.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"schedule": self.schedule.state_dict(), "step": self.step_number}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> "Training":
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.lm.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step_number = state["step"]
        return self


def fresh(name: str) -> LanguageModel:
    torch.manual_seed(0)
    return model(name, **SHARED)


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, other[name]) for name, p in one.items())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_real_text_from_a_zero_start(name: str) -> None:
    """With the output projections at zero, where the first gradient of much of the model is exactly zero."""
    training = Training(fresh(name))
    data = batches(30)
    for tokens in data:
        training.step(tokens)
    with torch.no_grad():
        after = float(training.lm.objective(data[0][:, :-1], data[0][:, 1:])[0])
    assert all(map(math.isfinite, training.losses))
    assert training.losses[0] == pytest.approx(math.log(256), abs=0.2)
    assert after < training.losses[0] - 0.15, f"{training.losses[0]:.3f} -> {after:.3f}"
    assert max(training.losses) < training.losses[0] + 0.5
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in training.lm.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_it_resumes_to_the_bit_from_any_step(name: str) -> None:
    data, whole, saved = batches(9), Training(fresh(name)), []
    for tokens in data:
        whole.step(tokens)
        saved.append(whole.saved())
    for step in (1, 2, 5, 8):
        again = Training(fresh(name)).load(saved[step - 1])
        for tokens in data[step:]:
            again.step(tokens)
        assert again.losses == whole.losses[step:], step
        assert equal(weights(again.lm), weights(whole.lm)), step


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_left_as_they_are_and_never_kept(name: str) -> None:
    """They keep their memory from step to step under DDP, and somebody may look at them after the step."""
    found = []
    for reuse in (False, True):
        training = Training(fresh(name), reuse=reuse)
        for tokens in batches(4):
            training.step(tokens)
        found.append(weights(training.lm))
    assert equal(*found)
    grads = [p.grad.clone() for p in training.lm.parameters()]
    training.optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(training.lm.parameters(), grads, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_closure_runs_once_and_its_loss_is_returned(name: str) -> None:
    lm, calls = fresh(name), []
    optimizer, tokens = lm.make_optimizer(), batches(1)[0]

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss, _ = lm.objective(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == pytest.approx(math.log(256), abs=0.2)
    assert calls == [True]


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_stays(name: str) -> None:
    training, data = Training(fresh(name)), batches(3)
    roles = training.lm.parameter_roles()
    still = [p for name, p in training.lm.named_parameters() if roles[name] == "matrix"][-1]
    still.requires_grad_(False)  # it gets none, though its group has it
    before = still.detach().clone()
    for tokens in data:
        training.step(tokens)
    assert torch.equal(still, before)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group_that_tells_its_values(name: str) -> None:
    lm = fresh(name)
    optimizer = lm.make_optimizer()
    places = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    assert places == Counter({id(p): 1 for p in lm.parameters()})
    told = {group["role"]: group for group in groups_told(optimizer)}
    assert told.keys() == {"matrix", "embedding", "vector"}
    assert all(group["lr"] > 0 for group in told.values())
    for role in ("embedding", "vector"):
        assert told[role].get("weight_decay", 0.0) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [fresh, lambda name: tiny_gpt2(optimizer=factory(name))], ids=["BlaGPT", "GPT-2"])
def test_embeddings_and_heads_never_reach_an_optimizer_of_matrices(name: str, build: object) -> None:
    lm = build(name)
    optimizer = lm.make_optimizer()
    if isinstance(optimizer, Composite):
        matrices = {id(p) for group in optimizer.members["matrix"].param_groups for p in group["params"]}
        roles = lm.parameter_roles()
        assert matrices == {id(p) for n, p in lm.named_parameters() if roles[n] == "matrix"}


@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_there_is_not_is_an_error(name: str) -> None:
    at = "--model.optimizer.matrix" if isinstance(made(name), Composite) else "--model.optimizer"
    with pytest.raises(ConfigError, match="learning_speed"):
        factory(name, f"{at}.learning_speed", "3")


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_the_command_line_arrives(name: str) -> None:
    at = "--model.optimizer.matrix" if isinstance(made(name), Composite) else "--model.optimizer"
    lm = fresh(name)
    lm.optimizer_factory = factory(name, f"{at}.lr", "0.0123")
    assert lm.make_optimizer().param_groups[0]["lr"] == 0.0123


def made(name: str) -> Optimizer:
    return fresh(name).make_optimizer()


def test_the_limits_see_a_learning_rate_that_is_wrong() -> None:
    """A tenth of a percent of it does not learn, and one of the wrong sign makes the loss larger."""
    for factor in (1e-3, -1):
        with pytest.raises(AssertionError):
            lm = fresh("adamw")
            original = lm.make_optimizer()
            for group in original.param_groups:
                group["lr"] *= factor
            lm.make_optimizer = lambda original=original: original
            training = Training(lm)
            for tokens in batches(30):
                training.step(tokens)
            assert training.losses[-1] < training.losses[0] - 0.15
            assert max(training.losses) < training.losses[0] + 0.5
