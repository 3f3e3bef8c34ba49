"""The memory that is predicted without memory, against steps that are really made on the CPU."""

import gc
import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import D, attention, batch, block, tiny, tiny_gpt2
from torch import Tensor, nn

from blagpt_pl.errors import ConfigError
from blagpt_pl.lab import fused
from blagpt_pl.lab.follow import autocast_of, follow
from blagpt_pl.lab.kernels import gpu_kernels
from blagpt_pl.lab.memory import step_memory
from blagpt_pl.lab.storages import CATEGORIES, Storages
from blagpt_pl.lm import LanguageModel
from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.memory import Budget, MemoryPolicy, RecomputeBlocks
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.mlp_pattention import PattentionMLP

ROOT = Path(__file__).resolve().parents[2]
B, T = 3, 32
MODELS = {
    "baseline": tiny,
    "gpt2": tiny_gpt2,
    "multi_token": partial(tiny, losses=[partial(MultiToken, n=3)]),
    "z_loss, untied": partial(tiny, losses=[ZLoss]),
    "dilated": partial(
        tiny, block=block(attention=attention(core=partial(Dilated, segments=[8, 16], dilations=[1, 2])))
    ),
    "token_bias, dropout": partial(tiny, token_bias=True, dropout=0.1),
    "pattention": partial(tiny, block=block(mlp=partial(PattentionMLP, n_tokens=48))),
}
PRECISIONS = ["32-true", "bf16-mixed"]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    storages = {id(s): s for s in (t.untyped_storage() for t in tensors if torch.is_tensor(t))}
    return sum(s.nbytes() for s in storages.values())


def baseline() -> LanguageModel:
    """configs/blagpt.yaml's model, at its full size."""
    full = partial(attention, n_heads=12, n_kv_heads=4, qkv_bias=True, out_bias=True)
    mlp = partial(GatedMLP, activation=SiLU, ratio=4, bias=True)
    fused_adamw = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    return tiny(
        vocab_size=50304,
        context=1024,
        d_model=768,
        n_layers=12,
        block=block(attention=full(), mlp=mlp),
        optimizer=fused_adamw,
    )


def really(make: Callable[[], LanguageModel], precision: str) -> tuple[LanguageModel, tuple, Callable]:
    """A model and its batch with data."""
    model = make()
    tokens, targets = batch(model, B, T)
    return model, (tokens.clone(), targets.clone()), partial(autocast_of, precision)


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count attention as the CPU makes it, to compare with steps made there."""
    monkeypatch.setattr("blagpt_pl.lab.memory.gpu_kernels", nullcontext)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_what_the_trunk_keeps_is_what_autograd_saves(name: str, precision: str) -> None:
    """Activations, counted without data, are the distinct storages that a real forward saves, but for the weights'."""
    model, (tokens, _), autocast = really(MODELS[name], precision)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        features = model.features(tokens)
    weights = list(model.parameters())
    of_weights = {id(p.untyped_storage()) for p in weights}
    copies = [p.detach().to(torch.bfloat16).flatten() for p in weights]

    def is_copy(t: torch.Tensor) -> bool:
        flat = torch.as_strided(t, (t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
        return t.dtype == torch.bfloat16 and any(len(c) == len(flat) and torch.equal(c, flat) for c in copies)

    kept = [t for t in saved if id(t.untyped_storage()) not in of_weights]
    assert features.requires_grad
    found = step_memory(MODELS[name], T, precision, compiled=False).peaks(B).kept
    targets = 8 * B * T
    assert found["activations"] - targets == nbytes(t for t in kept if not is_copy(t))
    assert found["casts"] >= nbytes(
        t for t in kept if is_copy(t)
    )  # autocast also keeps those of biases, and of the head
    assert (found["casts"] > 0) == (precision == "bf16-mixed")


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_the_peaks_without_data_are_those_of_a_real_step(name: str, precision: str) -> None:
    model, pair, autocast = really(MODELS[name], precision)
    gc.collect()
    real = follow(model, *pair, autocast(), Storages())
    fake = step_memory(MODELS[name], T, precision, compiled=False).peaks(B)
    for which in ("first", "later"):
        moments, expected = getattr(fake, which), getattr(real, which)
        assert {m: c.total() for m, c in moments.items()} == {m: c.total() for m, c in expected.items()}
    assert fake.later["loss"] == real.later["loss"]


@pytest.mark.parametrize(
    ("optimizer", "a_parameter", "a_tensor"),
    [
        (partial(torch.optim.AdamW, lr=1e-3), 8, 4),
        (partial(torch.optim.AdamW, lr=1e-3, fused=True), 8, 4),
        (partial(torch.optim.SGD, lr=1e-3), 0, 0),
        (partial(torch.optim.SGD, lr=1e-3, momentum=0.9), 4, 0),
        (partial(torch.optim.AdamW, lr=1e-3, amsgrad=True), 12, 4),
    ],
)
def test_weights_gradients_and_state_to_the_byte(optimizer: Callable, a_parameter: int, a_tensor: int) -> None:
    model = tiny()
    n, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    memory = step_memory(partial(tiny, optimizer=optimizer), T, "bf16-mixed", compiled=False)
    found = memory.peaks(1).later["optimizer step"]
    assert found["weights"] == 4 * n + nbytes(model.buffers())
    assert found["gradients"] == 4 * n
    assert found["optimizer"] == a_parameter * n + a_tensor * tensors
    assert memory.lower_bound is None


def test_sixteen_bit_weights_take_half() -> None:
    found = step_memory(tiny, T, "bf16-true", compiled=False).at(2)
    wide = step_memory(tiny, T, "32-true", compiled=False).at(2)
    assert found["gradients"] * 2 == wide["gradients"]
    assert wide["casts"] == 0
    assert found["casts"] < 2000  # the norms' gains, in float32


class Reader(torch.optim.SGD):
    """Decides by the data, as no optimizer without data can."""

    def step(self, closure: Callable | None = None) -> None:
        if self.param_groups[0]["params"][0].sum().item() > 0:
            super().step()


def test_an_optimizer_that_reads_data_leaves_a_lower_bound() -> None:
    memory = step_memory(partial(tiny, optimizer=partial(Reader, lr=0.1)), T, "32-true", compiled=False)
    assert "Reader does not run without data" in memory.lower_bound
    assert memory.at(1)["optimizer"] == 0
    assert memory.at(1)["total"] > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_categories_add_up_and_grow_in_a_straight_line(compiled: bool) -> None:
    memory = step_memory(tiny, T, "bf16-mixed", compiled)
    totals = []
    for b in (8, 16, 24):
        found = memory.at(b)
        assert tuple(found) == (*CATEGORIES, "total")
        assert sum(found[name] for name in CATEGORIES) == found["total"]
        totals.append(memory.peaks(b).kept["activations"])
    assert totals[1] - totals[0] == totals[2] - totals[1] > 0


def test_one_micro_batch_needs_no_earlier_gradients() -> None:
    memory = step_memory(partial(tiny, vocab_size=4001, n_layers=1), T, "32-true", compiled=False)
    several, one = memory.at(64), memory.at(64, micro_batches=1)
    assert memory.moment(64) == "loss"
    assert several["total"] - one["total"] == several["gradients"]


def test_logits_are_of_one_chunk_at_most() -> None:
    memory = step_memory(partial(tiny, vocab_size=4001), T, "32-true", compiled=False)
    logits = {tokens: memory.peaks(tokens // T).later["loss"]["logits"] for tokens in (32768, 65536, 131072)}
    assert logits[65536] > 1.9 * logits[32768]  # chunks are an eighth
    assert logits[131072] < 1.1 * logits[65536]
    assert (
        2 * 8192 * 4001 * 4 < logits[65536] < 2.2 * 8192 * 4001 * 4
    )  # scores, and log-softmax that becomes their gradient


# ------------------------------------------------------------------ compiled


@pytest.mark.usefixtures("cpu_kernels")
def test_compiled_regions_keep_what_torch_saves() -> None:
    """Against torch's own backend that cuts the graph alike, with data: one block of two, and the stream that leaves it."""
    model, (tokens, _), autocast = really(tiny, "bf16-mixed")
    storages = Storages()
    torch._dynamo.reset()
    model.compile_regions("aot_eager_decomp_partition")
    with storages, autocast():
        storages.relabel([*model.parameters()], "weights")
        storages.label = "activations"
        x, _ = model.trunk(tokens)
    torch._dynamo.reset()
    two, one = (step_memory(partial(tiny, n_layers=n), T, "bf16-mixed").peaks(B).kept for n in (2, 1))
    assert storages.alive["activations"] == two["activations"] - one["activations"] + x.untyped_storage().nbytes()
    assert storages.alive["casts"] == two["casts"] - one["casts"]


def test_compiled_keeps_less_than_eager() -> None:
    eager, compiled = (step_memory(tiny, T, "bf16-mixed", c).peaks(64) for c in (False, True))
    assert compiled.kept["activations"] < 0.8 * eager.kept["activations"]
    assert compiled.later["loss"]["logits"] < 0.9 * eager.later["loss"]["logits"]


def test_what_a_fused_kernel_writes() -> None:
    """Between two matrix products the elementwise chain is written once; what it reads is held until then."""

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x @ w).sin().exp() * 2).cos() @ w

    graph = torch.fx.experimental.proxy_tensor.make_fx(f)(torch.zeros(4, 4), torch.zeros(4, 4)).graph
    written = fused.written(graph)
    assert [n.name for n in graph.nodes if n in written and n.op == "call_function"] == ["mm", "cos", "mm_1"]
    let_go = {n.name: {u.name for u in used} for n, used in fused.last_uses(graph, written).items()}
    assert "mm" in let_go["cos"]


# ------------------------------------------------------------------ the whole baseline


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_full_size_allocates_nothing_and_agrees_with_the_reference() -> None:
    """142.6 M parameters at 32 x 1024 tokens; per token and layer as AOTAutograd's partitioner was found to save."""
    before, started = resident_mb(), time.perf_counter()
    per_layer = {}
    for compiled in (False, True):
        memory = step_memory(baseline, 1024, "bf16-mixed", compiled)
        found = memory.at(32)
        n = sum(p.numel() for p in memory.model.parameters())
        assert n == 142_570_752
        assert (found["weights"], found["gradients"]) == (4 * n + nbytes(memory.model.buffers()), 4 * n)
        assert found["optimizer"] == 8 * n + 4 * len(list(memory.model.parameters()))
        per_layer[compiled] = memory.peaks(32).kept["activations"] / (32 * 1024 * 12)
    assert resident_mb() - before < 200
    assert time.perf_counter() - started < 60  # some 5 s on an idle machine
    assert per_layer[False] == pytest.approx(54_361, rel=0.03)  # the original's blocks, eager
    assert per_layer[True] == pytest.approx(32_376, rel=0.03)  # compiled, with grouped heads that are not expanded


def test_the_largest_batch_is_the_largest() -> None:
    memory = step_memory(partial(tiny, context=256), 256, "bf16-mixed", compiled=False)
    for room in (4 * 10**7, 4 * 10**8):
        b = memory.largest_batch(room, reserve=0.1)
        assert memory.at(b)["total"] <= 0.9 * room < memory.at(b + 1)["total"]
    assert memory.largest_batch(10**6) == 0
    assert memory.largest_batch(4 * 10**8, reserve=0.5) < b


# ------------------------------------------------------------------ refusals, notes, and the tools


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError, match="trainer.precision: 'transformer-engine'.*bf16-mixed"):
        step_memory(tiny, T, "transformer-engine")
    with pytest.raises(ConfigError, match="data.device_batch_size: 0"):
        step_memory(tiny, T).at(0)
    with pytest.raises(ConfigError, match="reserve: 6"):
        step_memory(tiny, T).largest_batch(10**9, reserve=6)


def test_a_soft_cap_is_counted_as_a_fused_kernel() -> None:
    """Not as the (T, T) scores that its twin on the CPU makes."""
    capped = partial(tiny, context=512, block=block(attention=attention(core=SoftCapped)))
    plain = partial(tiny, context=512, block=block(attention=attention(core=SDPA)))
    found, expected = (step_memory(make, 512, "bf16-mixed", compiled=False).at(4) for make in (capped, plain))
    assert found == expected


def test_what_does_not_compile_is_counted_as_if_it_were_not_to_be() -> None:
    class Breaks(SDPA):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return super().forward(q, k, v)

    make = partial(tiny, block=block(attention=attention(core=Breaks)))
    memory = step_memory(make, T, "bf16-mixed", compiled=True)
    assert memory.at(2) == step_memory(make, T, "bf16-mixed", compiled=False).at(2)
    assert "upper bound" in memory.note
    assert "could not be followed compiled" in memory.note
    assert "could not" not in step_memory(tiny, T).note


def test_kernels_are_torch_s_again_afterwards() -> None:
    before = nn.functional.scaled_dot_product_attention
    with pytest.raises(KeyError), gpu_kernels():
        assert nn.functional.scaled_dot_product_attention is not before
        raise KeyError
    assert nn.functional.scaled_dot_product_attention is before


def test_storages_are_followed_from_birth_to_death() -> None:
    x = torch.zeros(10, 10, requires_grad=True)
    with Storages() as storages:
        storages.relabel([x], "weights")
        storages.enter("now", "activations")
        y = x * 2
        view = y.t()[1:]
        del y
        assert storages.alive == Counter(weights=400, activations=400)
        half = x.to(torch.bfloat16)
        assert storages.alive["casts"] == 200
        del view, half
        assert storages.alive == Counter(weights=400, activations=0, casts=0)
        assert storages.peaks["now"].total() == 1000


SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from functools import partial
import torch
from helpers import batch, tiny
from blagpt_pl.lab.memory import step_memory
torch.set_num_threads(2)
make = partial(tiny, vocab_size=16384, context=512, d_model=384, n_layers=5)
predicted = step_memory(make, 512, "32-true", compiled=False).at(16)
def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
model = tiny(); tokens, targets = batch(model, 2, 16); model.objective(tokens, targets)[0].backward(); del model
before = status("VmRSS:")
model = make(); optimizer = model.make_optimizer()
for p in model.parameters():
    p.grad = torch.zeros_like(p)
optimizer.step()  # the state is there, and gradients as after an earlier micro-batch
tokens, targets = batch(model, 16, 512)
model.objective(tokens, targets)[0].backward()
print(predicted["total"], status("VmHWM:") - before, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_peak_of_a_real_process() -> None:
    """Of a step of 8192 tokens a forward, with a model of some 13 M parameters."""
    script = textwrap.dedent(SCRIPT).format(root=str(ROOT), tests=str(ROOT / "tests"))
    gives_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory leaves the process at once
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=gives_back)
    predicted, real, parameters = map(int, done.stdout.split())
    assert 10e6 < parameters < 30e6
    assert predicted == pytest.approx(real, rel=0.1)


def test_the_largest_batch_where_the_loss_stops_growing() -> None:
    """Logits grow up to a chunk and no further, so the straight line through two larger numbers misleads."""
    memory = step_memory(partial(tiny, context=256, vocab_size=4001), 256, "bf16-mixed", compiled=False)
    for b in (30, 31):
        room = memory.at(b)["total"] + 1
        fresh = step_memory(partial(tiny, context=256, vocab_size=4001), 256, "bf16-mixed", compiled=False)
        assert fresh.largest_batch(room, reserve=0) == b


# ------------------------------------------------------------------ memory policies


@pytest.mark.parametrize("compiled", [False, True])
def test_a_recomputed_block_keeps_its_input(compiled: bool) -> None:
    made = partial(tiny, memory=RecomputeBlocks())
    two, one = (step_memory(partial(made, n_layers=n), T, "32-true", compiled).peaks(8).kept for n in (2, 1))
    assert two["activations"] - one["activations"] == 8 * T * D * 4  # (B, T, D) float32


def test_a_recomputed_step_peaks_as_a_real_one(cpu_kernels: None) -> None:
    """In the backward pass one block's activations are there again."""
    made = partial(tiny, memory=RecomputeBlocks(), n_layers=4)
    model, pair, autocast = really(made, "32-true")
    model.apply_memory_policy()
    gc.collect()
    real = follow(model, *pair, autocast(), Storages())
    fake = step_memory(made, T, "32-true", compiled=False).peaks(B)
    assert {m: c.total() for m, c in fake.later.items()} == {m: c.total() for m, c in real.later.items()}
    plain = step_memory(partial(tiny, n_layers=4), T, "32-true", compiled=False).peaks(B)
    assert fake.kept["activations"] < 0.4 * plain.kept["activations"]


def test_a_budget_keeps_less_where_activations_outweigh_weights() -> None:
    kept = [
        step_memory(partial(tiny, compile="inductor", memory=policy), T, "bf16-mixed").peaks(64).kept["activations"]
        for policy in (None, Budget(0.9), Budget(0.2))
    ]
    assert kept[0] > 1.1 * kept[1] > 1.21 * kept[2]


@pytest.mark.slow
def test_the_baseline_keeps_what_torch_was_measured_to_keep() -> None:
    """Bytes a token and layer at 32 x 1024 (docs/memory.md): all, and under a budget of 0.9, where nothing costly is redone."""
    found = {}
    for policy in (None, Budget(0.9)):
        two, one = (
            step_memory(lambda n=n, p=policy: large(n, p), 1024, "bf16-mixed").peaks(32).kept["activations"]
            for n in (2, 1)
        )
        found[policy is None] = (two - one) / (32 * 1024)
    assert found == {True: 32_376, False: 23_160}


def large(n_layers: int, policy: MemoryPolicy | None) -> LanguageModel:
    """The baseline's blocks at their full size, with as many of them as said."""
    full = attention(n_heads=12, n_kv_heads=4, qkv_bias=True, out_bias=True)
    mlp = partial(GatedMLP, activation=SiLU, ratio=4, bias=True)
    sizes = {"vocab_size": 50304, "context": 1024, "d_model": 768, "n_layers": n_layers}
    return tiny(**sizes, block=block(attention=full, mlp=mlp), compile="inductor", memory=policy)
