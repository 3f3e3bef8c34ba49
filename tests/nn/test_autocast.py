"""Backward passes run outside autocast: in the losses that make gradients in forward, when compiled, and between micro-batches."""

from collections.abc import Iterator
from functools import partial

import lightning as L
import pytest
import torch
from helpers import T, attention, batch, block, heads, shake, tiny
from torch import Tensor, nn
from torch._functorch import config
from torch.utils.data import DataLoader

from blagpt_pl.losses.multi_token import MultiToken, ahead
from blagpt_pl.losses.stored import gradients
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.autocast import without_autocast

dilated = partial(Dilated, segments=[8, 16], dilations=[1, 2])
bf16 = partial(torch.autocast, "cpu", torch.bfloat16)


class _Probe(torch.autograd.Function):
    """The identity, which notes whether its backward pass runs under autocast."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[bool]) -> Tensor:
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.seen.append(torch.is_autocast_enabled("cpu"))
        return grad, None


def probed(module: nn.Module) -> list[bool]:
    """For each backward pass through a module from now on, whether it ran under autocast."""
    seen: list[bool] = []
    module.register_forward_hook(lambda module, args, out: _Probe.apply(out, seen))
    return seen


def model_of(**changes: object) -> BlaGPT:
    """Dilated attention and two more heads, off the start."""
    torch.manual_seed(0)
    parts = block(attention=attention(core=dilated))
    return shake(tiny(block=parts, losses=[partial(MultiToken, n=3)], **changes), std=0.2)


def trained(model: BlaGPT) -> dict[str, Tensor]:
    """The gradients of a bf16 step: forward under autocast, backward outside."""
    tokens, targets = batch(model)
    with bf16():
        total, _ = model.objective(tokens, targets)
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def furthest(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest relative distance of two gradients of one parameter."""
    return max(((mine[name] - g).norm() / g.norm()).item() for name, g in theirs.items())


def test_autocast_is_left_where_there_is_one() -> None:
    with bf16():
        for device, off in (("cpu", True), ("meta", False)):  # meta has none
            with without_autocast(torch.device(device)):
                assert torch.is_autocast_enabled("cpu") is not off
        assert torch.is_autocast_enabled("cpu")
    with without_autocast(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")


def test_gradients_made_under_autocast_are_those_made_after_it() -> None:
    """Of the dilated core, which works in float32: a backward pass under autocast would round its products."""
    core, inputs = dilated(heads(4, 2, 8)), [torch.randn(2, n, 31, 8, requires_grad=True) for n in (4, 2, 2)]
    weight = torch.randn(2, 4, 31, 8)

    def loss() -> Tensor:
        return (core(*inputs) * weight).sum()

    with bf16():
        within, rounded, later = gradients(loss(), inputs), torch.autograd.grad(loss(), inputs), loss()
    expected = torch.autograd.grad(later, inputs)
    assert all(map(torch.equal, within, expected))
    assert max((a - b).norm() / b.norm() for a, b in zip(rounded, expected, strict=True)) > 1e-3


def test_losses_that_make_gradients_in_forward_leave_autocast_for_them() -> None:
    """The chunked loss runs backward through the head, each further head of multi-token prediction through its block."""
    model = model_of()
    of_head, *of_blocks = map(probed, (model.head, *model.losses[0].blocks))
    tokens, targets = batch(model)
    with bf16():
        total, _ = model.objective(tokens, targets)
    assert of_head == [False] * 3
    assert of_blocks == [[False], [False]]
    total.backward()
    assert [of_head, *of_blocks] == [[False] * 3, [False], [False]]  # nothing is done twice


def test_a_further_heads_gradients_are_those_made_after_autocast() -> None:
    """By hand, from the last loss backwards: the chunked loss makes its part within the forward pass, as it always does."""
    model = model_of()
    (extra, *_), (tokens, targets) = model.losses[0].blocks, batch(model)
    trunk, carry = model.trunk(tokens)
    targets, parameters = ahead(targets, 1), list(extra.parameters())

    def loss() -> Tensor:
        return targets.numel() * model.next_token(model.finish(trunk, carry, extra), targets)

    with bf16():
        total, _ = model.losses[0](model, trunk, carry, batch(model)[1])
        rounded, later = torch.autograd.grad(loss(), parameters), loss()
    mine, expected = (torch.autograd.grad(y, parameters, retain_graph=True) for y in (total, later))
    assert all(torch.equal(a, b / targets.numel()) for a, b in zip(mine, expected, strict=True))
    assert max((a - b).norm() / b.norm() for a, b in zip(rounded, expected, strict=True)) > 1e-3


def test_the_probe_sees_a_backward_pass_under_autocast() -> None:
    layer = nn.Linear(3, 3)
    seen = probed(layer)
    with bf16():
        layer(torch.randn(2, 3)).sum().backward()
    layer(torch.randn(2, 3)).sum().backward()
    assert seen == [True, False]


@pytest.fixture
def as_torch_is() -> Iterator[None]:
    """The setting of torch that `configure_model` changes, and its own default before and after."""
    torch._dynamo.reset()
    with config.patch(backward_pass_autocast="same_as_forward"):
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("as_torch_is")
def test_compiled_the_backward_pass_is_outside_autocast_too() -> None:
    """By itself torch compiles it as its forward pass ran, under autocast."""
    eager, compiled = trained(model_of()), model_of(compile="aot_eager")
    compiled.configure_model()
    assert config.backward_pass_autocast == "off"
    assert furthest(trained(compiled), eager) < 1e-5
    torch._dynamo.reset()
    spoilt = model_of(compile="aot_eager")
    spoilt.configure_model()
    with config.patch(backward_pass_autocast="same_as_forward"):
        assert furthest(trained(spoilt), eager) > 1e-3


@pytest.mark.usefixtures("as_torch_is")
def test_a_model_that_is_not_compiled_leaves_torch_alone() -> None:
    model_of().configure_model()
    assert config.backward_pass_autocast == "same_as_forward"


@pytest.mark.filterwarnings("ignore:.*(val_dataloader|does not have many workers).*")
@pytest.mark.parametrize("n", [1, 3])
def test_every_micro_batch_has_its_backward_pass_outside_autocast(n: int) -> None:
    """Lightning leaves autocast before the last one's alone; the others run in the middle of a training step."""
    model, forwards = tiny(), []
    seen = probed(model.blocks[0])
    model.blocks[0].register_forward_pre_hook(lambda *_: forwards.append(torch.is_autocast_enabled("cpu")))
    tokens = torch.randint(model.vocab_size, (n, 2, T + 1))
    trainer = L.Trainer(
        max_steps=2, precision="bf16-mixed", accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader([(tokens[..., :-1], tokens[..., 1:])] * 2, batch_size=None))
    assert trainer.global_step == 2
    assert forwards == [True] * 2 * n
    assert seen == [False] * 2 * n
