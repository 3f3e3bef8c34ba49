"""HeavyBall's optimizers by their plain names: read by the parser, resumed to the bit, gradients left, imported lazily."""

import inspect
import io
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import tiny
from promises import learn
from quadratic import gradients, parameters
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

import blagpt_pl.optim.heavy
from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import tiny as small
from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.mistakes import options
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.optim.heavy import LEFT_OUT, UNFIT

import heavyball  # isort: skip  after its adapter, which a configuration has always imported

executed: list[int] = []


class Bomb:
    """What executes something where it is unpickled."""

    def __reduce__(self) -> tuple:
        return explode, ()


def explode() -> None:
    executed.append(1)


ROOT = Path(__file__).resolve().parents[2]
ALL = [name for name in heavyball.__all__ if inspect.isclass(getattr(heavyball, name)) and name not in UNFIT]
QUICK = [
    name
    for name in ALL
    if not any(word in name for word in ("SOAP", "Shampoo", "SOLP", "Muon", "PSGDK", "LATHER", "Scion"))
]
SHAPES = ((12, 8), (8, 8), (8,))


def optimizer(path: str, *words: str) -> torch.optim.Optimizer:
    said = ["--config", f"{ROOT}/configs/blagpt.yaml", "--model.optimizer", path, *words]
    return model_of(Layers(small.tiny(layers_for(said).tree))).make_optimizer()


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_a_type_and_no_name_is_swallowed(name: str) -> None:
    for option in options(getattr(heavyball, name), 1).values():
        assert option.annotation is not inspect.Parameter.empty and option.kind is not inspect.Parameter.VAR_KEYWORD
        assert type(option.default) in (bool, int, float, str, tuple, type(None)), option
        assert option.name not in LEFT_OUT


@pytest.mark.parametrize("name", ["AdEMAMix", "UnscaledAdamW", "AdamW", "RMSprop", "NAdam"])
def test_a_plain_class_path_with_its_values(name: str) -> None:
    found = optimizer(f"heavyball.{name}", "--model.optimizer.lr", "0.0123", "--model.optimizer.weight_decay", "0.2")
    assert type(found) is getattr(heavyball, name)
    assert {g["role"]: (g["lr"], g["weight_decay"]) for g in found.param_groups} == {
        "matrix": (0.0123, 0.2),
        "embedding": (0.0123, 0.0),
        "vector": (0.0123, 0.0),
    }
    assert not found.consume_grad and not found.compile_step and heavyball.utils.compile_mode is None


@pytest.mark.parametrize("name", ["SOAP", "PSGDKron", "MuonAdamW", "PaLMForeachSOAP"])
def test_tables_never_reach_an_optimizer_of_matrices(name: str) -> None:
    named = "SOAP" if name == "PaLMForeachSOAP" else f"heavyball.{name}"
    with pytest.raises(ConfigError, match=f"role embedding; fix: class_path: Composite with matrix: {named} and"):
        optimizer(f"heavyball.{name}")
    yaml = (
        "Composite",
        "--model.optimizer.matrix",
        f"heavyball.{name}",
        "--model.optimizer.other",
        "torch.optim.AdamW",
    )
    assert type(optimizer(*yaml).members["matrix"]) is getattr(heavyball, name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.optimizer.alhpa", "3"], "alhpa: AdEMAMix has no such option; did you mean alpha"),
        (["--model.optimizer.mars", "true"], "mars: AdEMAMix has no such option"),
        (["--model.optimizer.lr", "fast"], "lr: 'fast' .expected a number"),
        (["--model.optimizer.storage_dtype", "int3"], "storage_dtype: 'int3' .expected 'float32'"),
        (["--model.optimizer.betas", "[0.9]"], "betas"),
        (["--model.optimizer.update_clipping", "none_such"], "Unknown function 'none_such'"),
    ],
)
def test_what_there_is_not_is_an_error_before_training(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer("heavyball.AdEMAMix", *words)


@pytest.mark.parametrize(("name", "why"), UNFIT.items())
def test_what_does_not_fit_says_why(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=f"heavyball.{name}: {why[:20]}"):
        optimizer(f"heavyball.{name}")


def test_bare_names_are_never_heavyballs() -> None:
    assert type(optimizer("AdamW")) is torch.optim.AdamW
    with pytest.raises(ConfigError, match="PSGDPRO"):
        optimizer("PSGDPRO")


@pytest.mark.parametrize("name", [*QUICK, "SOAP", "PSGDKron"])
def test_it_resumes_to_the_bit_and_leaves_the_gradients(name: str) -> None:
    def descend(params: list, optimizer: torch.optim.Optimizer, schedule: LambdaLR, steps: range) -> list:
        for step in steps:
            grads = gradients(params, step)
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            torch.manual_seed(step)
            optimizer.step()
            schedule.step()
            assert all(torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))
        return [p.detach().clone() for p in params]

    def fresh(params: list) -> tuple[list, torch.optim.Optimizer, LambdaLR]:
        made = getattr(heavyball, name)(params)
        return params, made, LambdaLR(made, lambda step: 1 / (1 + step))

    whole = fresh(parameters(torch.float32, SHAPES))
    other = fresh([Parameter(w) for w in descend(*whole, range(3))])
    file = io.BytesIO()
    torch.save([one.state_dict() for one in whole[1:]], file)
    file.seek(0)
    for one, state in zip(other[1:], torch.load(file, weights_only=True), strict=True):
        one.load_state_dict(state)
    for a, b in zip(descend(*whole, range(3, 6)), descend(*other, range(3, 6)), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("values", [{"storage_dtype": "bfloat16"}, {"ecc": "bf16+8"}])
def test_a_state_comes_back_in_its_own_precision(values: dict) -> None:
    params = parameters(torch.float32)
    one, other = heavyball.AdamW(params, **values), heavyball.AdamW(parameters(torch.float32), **values)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    one.step()
    other.load_state_dict(one.state_dict())
    saved, loaded = one.state_dict(), other.state_dict()
    flat = [
        [v for state in s["state"].values() for part in state.values() for v in part.values()] for s in (saved, loaded)
    ]
    assert [getattr(v, "dtype", v) for v in flat[0]] == [getattr(v, "dtype", v) for v in flat[1]]
    assert not any(isinstance(v, set) for v in flat[0])


def test_nothing_in_a_state_is_executed() -> None:
    made = heavyball.SOAP(parameters(torch.float32))
    state = made.state_dict()
    assert "heavyball" not in state
    schedule, bomb = made.precond_schedule, pickle.dumps(Bomb())
    pickle.loads(bomb)
    assert executed == [1]  # it would go off
    executed.clear()
    made.load_state_dict(state | {"heavyball": {"precond_schedule": bomb, "step": bomb, "inner_group": bomb}})
    assert not executed
    assert made.precond_schedule == schedule and callable(made.step)


def test_it_learns_from_a_zero_start() -> None:
    losses, _ = learn(tiny(optimizer=partial(heavyball.AdamW, lr=3e-3)))
    assert losses[-1] < losses[0] - 1


def test_it_is_imported_when_a_configuration_names_it_and_not_before() -> None:
    code = (
        "import sys; from blagpt_pl.lab.parts import import_all; import_all(); assert 'heavyball' not in sys.modules;"
        "import heavyball; assert heavyball.utils.compile_mode is None and heavyball.PaLMForeachSOAP"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_imported_before_it_is_adapted_at_once() -> None:
    before = heavyball.AdamW.__init__
    blagpt_pl.optim.heavy.wait()  # once more, which changes nothing
    assert heavyball.AdamW.__init__ is before


def test_imported_before_this_house_it_is_adapted() -> None:
    code = (
        "import heavyball; assert not hasattr(heavyball, 'PaLMForeachSOAP');"
        "import blagpt_pl.optim.heavy; assert heavyball.utils.compile_mode is None and heavyball.PaLMForeachSOAP"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_no_table_reaches_one_of_matrices(role: str) -> None:
    with pytest.raises(ValueError, match=f"found parameters of role {role}"):
        heavyball.SOAP([{"params": [Parameter(torch.ones(4, 3))], "role": role}])


def test_a_state_whose_numbers_have_become_words_comes_back() -> None:
    """As torch's sharded checkpoints make them."""
    params, others = parameters(torch.float32), parameters(torch.float32)
    one, other = heavyball.AdamW(params), heavyball.AdamW(others)
    for p, g in zip(params, gradients(params, 0), strict=True):
        p.grad = g
    one.step()
    saved = one.state_dict()
    words = {key: {str(n): view for n, view in views.items()} for key, views in saved["state"].items()}
    other.load_state_dict({**saved, "state": words})
    assert [other.state[p].keys() for p in others] == [one.state[p].keys() for p in params]
