"""Memory policies change what is kept, never what is computed: loss, gradients, keys, ranks; and what each refuses."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._functorch.config
from helpers import attention, batch, block, shake, tiny
from ranks import RANKS, Objective, full, joined, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.base import Carry, SequenceMixer, Site
from blagpt_pl.nn.block import Block
from blagpt_pl.nn.memory import Budget, MemoryPolicy, RecomputeBlocks, Recomputed
from blagpt_pl.sharding import shard, without_sync

L = 3


class Writes(SequenceMixer):
    """Layer 0 leaves its values, the others add to them; a later layer's loss reaches layer 0 through the memo."""

    runs = 0

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.values = nn.Linear(site.d_model, site.d_model)
        self.layer = site.layer

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        if not torch.compiler.is_compiling():
            type(self).runs += 1
        v = self.values(x).tanh()
        if self.layer:
            v = v + carry.memo["first"] + carry.memo["last"]
        else:
            carry.memo["first"] = v
        carry.memo["last"] = v * 0.5  # written anew by every layer: the recomputation must read the one from before it
        return v + carry.x0


MODELS = {
    "memo": partial(tiny, block=block(attention=Writes)),
    "memo, dropout": partial(tiny, block=block(attention=Writes, dropout=0.3), dropout=0.1),
    "attention": partial(tiny, block=block(attention=attention(), dropout=0.1)),
    "multi-token": partial(tiny, block=block(dropout=0.1), losses=[partial(MultiToken, n=3)]),
    "multi-token, memo": partial(tiny, block=block(attention=Writes), losses=[partial(MultiToken, n=2)]),
}


def made(name: str, compile: str | None = None, policy: MemoryPolicy | None = None) -> BlaGPT:
    """A model with its policy at work, off its start, in float64."""
    if compile is not None:
        torch._dynamo.reset()  # torch's limit of graphs is for one model
    torch.manual_seed(0)
    model = shake(MODELS[name](n_layers=L, compile=compile, memory=policy)).double()
    model.configure_model()
    return model


def learn(model: BlaGPT, rows: int = 3) -> list[Tensor]:
    """Loss and gradients of two micro-batches, and the loss that is measured without gradients."""
    tokens, targets = batch(model, rows)
    torch.manual_seed(7)
    losses = []
    for _ in range(2):
        loss, parts = model.objective(tokens, targets)
        loss.backward()
        losses += [loss.detach(), *(part.detach() for part in parts.values())]
    gradients = [p.grad for p in model.parameters()]
    return [*losses, *gradients, model.eval().measure(tokens, targets)]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def nbytes_saved(run: Callable[[], object], apart_from: nn.Module) -> int:
    """Bytes of the distinct storages that `run()` keeps for its backward pass, weights left out."""
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    weights = {id(p.untyped_storage()) for p in apart_from.parameters()}
    assert out.requires_grad
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):  # the memo has other names in every layer: a graph for each
        yield
    torch._dynamo.reset()


# ------------------------------------------------------------------ recomputed blocks


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, None) for name in MODELS), ("memo, dropout", "aot_eager"), ("multi-token", "aot_eager")],
)
def test_the_loss_and_every_gradient_are_the_same(name: str, backend: str | None) -> None:
    plain, recomputed = learn(made(name, backend)), learn(made(name, backend, RecomputeBlocks()))
    assert gap(plain, recomputed) < 1e-12
    assert min(g.abs().max() for g in plain[1:]) > 1e-6  # nothing is compared that is zero


def test_a_recomputation_that_sees_the_carry_of_later_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: checkpointing a block as it stands reads the memo that later blocks have left."""

    def as_it_stands(self: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        return checkpoint(super(Recomputed, self).forward, x, carry, use_reentrant=False)

    monkeypatch.setattr(Recomputed, "forward", as_it_stands)
    assert gap(learn(made("memo")), learn(made("memo", policy=RecomputeBlocks()))) > 1e-3


def test_each_block_runs_twice_in_training_and_once_without_gradients() -> None:
    model = made("memo", policy=RecomputeBlocks())
    tokens, targets = batch(model)
    Writes.runs = 0
    model.objective(tokens, targets)[0].backward()
    assert Writes.runs == 2 * L
    Writes.runs = 0
    with torch.no_grad():
        model.objective(tokens, targets)
    assert Writes.runs == L


def test_a_block_keeps_its_input_alone() -> None:
    tokens, _ = batch(made("attention"), 4, 32)
    plain, recomputed = (made("attention", policy=p) for p in (None, RecomputeBlocks()))
    before, after = (nbytes_saved(lambda m=m: m.trunk(tokens)[0], m) for m in (plain, recomputed))
    stream = tokens.numel() * 32 * 8  # (B, T, D) in float64
    assert after < 1.05 * (L - 1) * stream  # the inputs of two blocks, and the tokens that were looked up
    assert before > 10 * after


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_keep_their_input_alone() -> None:
    tokens, _ = batch(made("attention"), 4, 32)
    plain, recomputed = (made("attention", "aot_eager", p) for p in (None, RecomputeBlocks()))
    before, after = (nbytes_saved(lambda m=m: m.trunk(tokens)[0], m) for m in (plain, recomputed))
    assert before > 6 * after


def test_what_is_not_differentiated_is_let_go_at_once() -> None:
    """A block's function must not hold the carry that will hold what the block returns: no collector would see the circle."""
    model = made("memo", policy=RecomputeBlocks())
    gc.collect()
    gc.disable()
    try:
        x, carry = model.trunk(batch(model)[0])
        left = weakref.ref(carry.memo["last"].untyped_storage())
        del x, carry
        assert left() is None
    finally:
        gc.enable()


def test_names_copies_and_kinds_stay() -> None:
    model, plain = made("memo", policy=RecomputeBlocks()), made("memo")
    model.apply_memory_policy()  # once more changes nothing
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(isinstance(b, Block) and type(b).__mro__[2] is Block for b in model.blocks)
    assert gap(learn(copy.deepcopy(model)), learn(plain)) < 1e-12


def test_the_model_counts_its_own_flops_alone() -> None:
    assert made("attention", policy=RecomputeBlocks()).flops_per_token() == made("attention").flops_per_token()


def test_a_backend_that_draws_other_masks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.memory: RecomputeBlocks would draw other dropout masks"):
        tiny(memory=RecomputeBlocks(), compile="eager")


# ------------------------------------------------------------------ budget


@pytest.mark.usefixtures("fresh_compiler")
def test_a_budget_keeps_less_and_computes_the_same() -> None:
    """At a size where activations outweigh the weights of a block, and without dropout, whose masks would be drawn anew."""
    found = {}
    for fraction in (1.0, 0.9, 0.2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        policy = None if fraction == 1 else Budget(fraction)
        model = shake(tiny(n_layers=L, compile="aot_eager", memory=policy)).double()
        model.configure_model()
        tokens, _ = batch(model, 32, 32)
        found[fraction] = nbytes_saved(lambda m=model, t=tokens: m.trunk(t)[0], model), learn(model, 32)
    kept = [n for n, _ in found.values()]
    assert kept[0] > 1.1 * kept[1] > 1.21 * kept[2]
    assert max(gap(found[1.0][1], found[f][1]) for f in (0.9, 0.2)) < 1e-12


@pytest.mark.usefixtures("fresh_compiler")
def test_the_budget_is_set_for_the_regions_alone() -> None:
    seen: list[tuple[bool, float]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.append(("scaled_dot_product" in graph.code, torch._functorch.config.activation_memory_budget))
        return graph

    model = tiny(compile=backend, memory=Budget(0.7))
    model.configure_model()
    model.objective(*batch(model))
    assert {budget for of_block, budget in seen if of_block} == {0.7}
    assert {budget for of_block, budget in seen if not of_block} == {1.0}
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.usefixtures("fresh_compiler")
def test_the_budget_is_set_for_the_whole_graph() -> None:
    seen: list[float] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.append(torch._functorch.config.activation_memory_budget)
        return graph

    model = tiny(compile=backend, whole_graph=True, memory=Budget(0.7))
    model.configure_model()
    model.objective(*batch(model))
    assert seen == [0.7]


def test_the_blocks_of_terms_are_recomputed_too() -> None:
    model = made("multi-token", policy=RecomputeBlocks())
    assert [type(block).__name__ for block in model.losses[0].blocks] == ["RecomputedBlock"] * 2


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_budget_that_is_no_share(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"Budget\.fraction: .* \(expected a share above 0 and below 1"):
        Budget(fraction)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_budget_without_a_compiler_is_refused(backend: str | None) -> None:
    with pytest.raises(ValueError, match=r"model\.memory: Budget has no effect with model\.compile"):
        tiny(memory=Budget(), compile=backend)


# ------------------------------------------------------------------ weights of 16 bit


def test_the_ruler_stays_wide_where_weights_are_cast() -> None:
    """`bf16-true` casts the whole module; token counts would stop growing at 256 batches, and val/loss with them."""
    model = tiny().to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokens, targets = batch(model)
    for _ in range(600):
        model.ruler.update(torch.tensor(3.0), torch.tensor(1))
    assert model.ruler.sums.dtype == torch.float64
    assert model.ruler.compute()["tokens"] == 600
    loss, _ = model.objective(tokens, targets)
    assert loss.dtype == torch.float32
    assert model.measure(tokens, targets).dtype == torch.float64


def test_an_update_below_half_a_step_is_lost_in_sixteen_bit() -> None:
    """The warning of configs/memory/bf16_weights.yaml: a gain of 1 does not move at a learning rate of 1e-3."""
    for dtype, moves in ((torch.float32, True), (torch.bfloat16, False)):
        gain = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = torch.optim.AdamW([gain], lr=1e-3, weight_decay=0.0)
        for _ in range(20):
            gain.grad = torch.ones_like(gain)
            optimizer.step()
        assert (gain != 1).any() == moves


# ------------------------------------------------------------------ ranks

STEPS, MICRO, ROWS, LENGTH = 3, 2, 2, 12


def train(kind: str, ranks: slice, mesh: DeviceMesh | None = None) -> dict[str, Tensor]:
    """The weights after all steps on the sequences of these ranks; without recomputation where it is one rank."""
    model = made("memo", policy=None if kind == "one" else RecomputeBlocks())
    objective = Objective(model)
    if kind == "ddp":
        objective = DistributedDataParallel(objective)
    if kind == "fsdp":
        shard(model, model.regions(), mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dice = torch.Generator().manual_seed(1)
    data = torch.randint(model.vocab_size, (STEPS, MICRO, RANKS, ROWS, LENGTH + 1), generator=dice)
    for step in data[:, :, ranks].flatten(2, 3):
        optimizer.zero_grad()
        for micro, rows in enumerate(step):
            quiet = objective.no_sync() if kind == "ddp" else without_sync(model)
            with quiet if micro < MICRO - 1 else torch.enable_grad():
                (objective(rows[:, :-1], rows[:, 1:]) / MICRO).backward()
        optimizer.step()
    return full(dict(model.named_parameters()))


def work(rank: int, folder: Path) -> None:
    """One rank of two."""
    with joined(rank, folder) as (mesh, results):
        results |= {kind: train(kind, slice(rank, rank + 1), mesh) for kind in ("ddp", "fsdp")}


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """DDP and FSDP2 with recomputed blocks, against one rank without; every layer reads what the one before it has written."""
    alone, start = train("one", slice(0, RANKS)), dict(made("memo").named_parameters())
    for result in run(work, tmp_path):
        for kind, found in result.items():
            assert found.keys() == alone.keys()
            assert gap(list(found.values()), list(alone.values())) < 1e-12, kind
    assert min((start[name] - p).abs().max() for name, p in alone.items()) > 1e-6
