"""A model that starts with the weights of another: the same function, once and again grown, or a refusal in one line."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import D, V, block, shake, tiny
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blagpt_pl.errors import CheckpointError
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.base import Init, Site
from blagpt_pl.nn.head import LinearHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.init_from import FromCheckpoint, Grows
from blagpt_pl.nn.mlp_pattention import PattentionMLP
from blagpt_pl.nn.pattention import Pattention

N = 24
FRESH = GPT2Init(zero_outputs=False)
TOKENS = torch.arange(40).view(2, 20) * 7 % V


def tokenformer(n: int = N, n_0: int | None = None, **changes: Any) -> BlaGPT:
    """A small TokenFormer with n tokens a map, which it had n_0 of."""
    mixer = partial(PattentionAttention, n_heads=4, n_tokens=n, core=SDPA, edits=[RoPE], grown_from=n_0)
    mlp = partial(PattentionMLP, n_tokens=n, grown_from=n_0)
    return tiny(**{"block": block(attention=mixer, mlp=mlp), "init": FRESH, **changes})


def saved(model: nn.Module, file: Path) -> str:
    """As a run's checkpoint has it."""
    torch.save({"state_dict": model.state_dict(), "config": "x", "optimizer_states": []}, file)
    return str(file)


def gap(one: BlaGPT, other: BlaGPT, dtype: torch.dtype) -> float:
    """The largest difference between logits, in proportion to them."""
    a, b = (copy.deepcopy(model).to(dtype).eval()(TOKENS).detach() for model in (one, other))
    return ((a - b).abs().max() / a.abs().max()).item()


@pytest.fixture
def donor(tmp_path: Path) -> tuple[BlaGPT, str]:
    """A model that has learnt something, and its checkpoint."""
    model = shake(tokenformer(), std=0.3)
    return model, saved(model, tmp_path / "donor.ckpt")


@pytest.mark.parametrize("build", [tokenformer, tiny], ids=["TokenFormer", "BlaGPT"])
def test_the_same_model_takes_over_every_tensor(build: Callable[..., BlaGPT], tmp_path: Path) -> None:
    one = shake(build(), std=0.3)
    path = saved(one, tmp_path / "one.ckpt")
    other = build(init=FromCheckpoint(path, FRESH))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert other.head.weight is other.embedding.weight
    shake(other)
    assert gap(build(init=FromCheckpoint(path, FRESH)), one, torch.float64) == 0  # the file is left alone


class Noise(Init):
    """A stranger's: everything N(0, 1), new keys too."""

    def __call__(self, model: nn.Module, site: Site) -> None:
        for parameter in model.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("otherwise", [FRESH, GPT2Init(zero_outputs=True), Noise()])
def test_a_grown_model_is_the_same_function(donor: tuple[BlaGPT, str], otherwise: Init, tmp_path: Path) -> None:
    """Once, and once more after it has learnt something else."""
    small, path = donor
    once = tokenformer(2 * N, N, init=FromCheckpoint(path, otherwise))
    assert gap(once, small, torch.float32) < 1e-6
    assert gap(once, small, torch.float64) < 1e-12
    shake(once, std=0.1)
    twice = tokenformer(5 * N, N, init=FromCheckpoint(saved(once, tmp_path / "once.ckpt"), otherwise))
    assert gap(twice, once, torch.float64) < 1e-12
    assert gap(twice, small, torch.float64) > 1e-2
    twice(TOKENS).square().sum().backward()
    for module in twice.modules():
        if isinstance(module, Pattention):
            assert module.keys.grad.count_nonzero(1).all() and not module.keys[2 * N :].any()
            assert module.values[:, 2 * N :].std() > 0.1 * module.value_std


def test_what_the_file_does_not_hold_starts_otherwise(donor: tuple[BlaGPT, str]) -> None:
    torch.manual_seed(5)
    fresh = tokenformer(2 * N, N)
    torch.manual_seed(5)
    grown = tokenformer(2 * N, N, init=FromCheckpoint(donor[1], FRESH))
    for old, begun, new in zip(*(filter(is_pattention, m.modules()) for m in (donor[0], fresh, grown)), strict=True):
        assert torch.equal(new.keys, torch.cat([old.keys, begun.keys[N:]]))
        assert torch.equal(new.values, torch.cat([old.values, begun.values[:, N:]], 1))


def is_pattention(module: nn.Module) -> bool:
    return isinstance(module, Pattention)


def test_tensors_of_another_precision_are_taken_over(tmp_path: Path) -> None:
    one = shake(tiny(), std=0.3).bfloat16()
    other = tiny(init=FromCheckpoint(saved(one, tmp_path / "low.ckpt"), FRESH))
    assert other.embedding.weight.dtype == torch.float32
    assert torch.equal(other.embedding.weight, one.embedding.weight.float())


@pytest.mark.parametrize("without", [partial(torch.device, "meta"), FakeTensorMode], ids=["meta", "fake"])
def test_without_memory_no_file_is_read(without: Callable) -> None:
    with without():
        tokenformer(2 * N, N, init=FromCheckpoint("nowhere.ckpt", FRESH))


class Larger(nn.Module, Grows):
    """A stranger's: a vector that grows by zeros."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(n))

    def grown(self, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: torch.cat([x, x.new_zeros(len(self.x) - len(x))]) for name, x in old.items()}


class Nothing(Init):
    """Leaves everything as it is."""

    def __call__(self, model: nn.Module, site: Site) -> None:
        pass


def test_a_strangers_module_grows_as_it_says(tmp_path: Path) -> None:
    """The model itself, a module in it, and one that stands there twice."""
    site, old = Site(D, 1, 0, V, 8), torch.arange(3.0)
    path = tmp_path / "x.ckpt"
    shared = Larger(5)
    for model, names in ((Larger(5), ["x"]), (nn.ModuleList([shared, Larger(3), shared]), ["0.x", "1.x", "2.x"])):
        torch.save({"state_dict": dict.fromkeys(names, old)}, path)
        FromCheckpoint(str(path), Nothing())(model, site)
        assert [t.tolist() for t in model.state_dict().values()] == [
            [0, 1, 2] if name == "1.x" else [0, 1, 2, 0, 0] for name in names
        ]
    torch.save({"state_dict": {"0.x": old, "1.x": old, "2.x": old + 1}}, path)
    with pytest.raises(ValueError, match=r"0.x and 2.x: two tensors there, one here; fix: untie them"):
        FromCheckpoint(str(path), Nothing())(model, site)


def test_an_untied_head_does_not_fit_a_tied_one(tmp_path: Path) -> None:
    path = saved(tiny(head=LinearHead), tmp_path / "untied.ckpt")
    with pytest.raises(ValueError, match="untied.ckpt: holds no head.weight; fix: the parts"):
        tiny(init=FromCheckpoint(path, FRESH))
    state = tiny().state_dict()
    torch.save({"state_dict": {**state, "head.weight": state["head.weight"] + 1}}, path)
    with pytest.raises(ValueError, match="embedding.weight and head.weight: two tensors there, one here; fix: untie"):
        tiny(init=FromCheckpoint(path, FRESH))


Q = r"blocks\.0\.attention\.part\.q"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(tokenformer, 2 * N), rf"{Q}: a mean over 24 tokens there, over 48 here; fix: grown_from: 24"),
        (partial(tokenformer, 2 * N, N - 1), rf"{Q}: a mean over 24 tokens there, over 23 here; fix: grown_from: 24"),
        (
            partial(tokenformer, N - 4),
            rf"{Q}: 24 tokens there, 20 here \(expected as many or more\); fix: n_tokens: 24",
        ),
        (partial(tokenformer, d_model=16), r"embedding.weight: \(61, 32\) there, \(61, 16\) here; fix: the sizes"),
        (partial(tokenformer, n_layers=3), r"holds no blocks\.2\.\S+; fix: the parts and layers"),
        (partial(tokenformer, n_layers=1), r"blocks\.1\.\S+: has no place in this model; fix: the parts and layers"),
        (tiny, r"holds no blocks\.0\.\S+; fix: the parts and layers"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(donor: tuple[BlaGPT, str], build: partial, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.init: \S+donor\.ckpt: {message}") as told:
        build(init=FromCheckpoint(donor[1], FRESH))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "x.ckpt: no such checkpoint"),
        (b"hello", "x.ckpt: damaged or not a checkpoint"),
        ({"weights": 1}, "x.ckpt: not a checkpoint of this program"),
        ({"state_dict": {"x": Path("an object")}}, "x.ckpt: refused, it holds more than data"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        tiny(init=FromCheckpoint(str(file), FRESH))
    torch.save({"state_dict": {"embedding.weight": 3}}, file)
    with pytest.raises(ValueError, match="its state_dict holds more than tensors"):
        tiny(init=FromCheckpoint(str(file), FRESH))


@pytest.mark.parametrize("otherwise", [None, FromCheckpoint("x", FRESH), GPT2Init])
def test_otherwise_is_a_start_without_a_file(otherwise: Any) -> None:
    with pytest.raises(
        ValueError, match=r"model.init.otherwise: \w+ \(expected a start without a file, such as GPT2In"
    ):
        FromCheckpoint("x", otherwise)
