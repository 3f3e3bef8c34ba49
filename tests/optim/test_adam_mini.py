"""Adam-mini: equal to the loop over blocks and to its authors' rules; blocks of a model; half of AdamW's state."""

import io
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import SITE, VARIANTS, attention, batch, block, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_adam_mini import adam_mini_naive
from promises import check_promises
from quadratic import STEPS, gap, gradients, parameters, trajectory
from torch import Tensor, nn
from torch.nn import Parameter

from blagpt_pl.lab.layers import Layers
from blagpt_pl.lab.model_of import layers_for, model_of
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.roles import blocks_of
from blagpt_pl.optim.adam_mini import AdamMini
from blagpt_pl.optim.roles import groups_by_role

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((12, 8), (8,), (8,), (6, 3, 2), ())
BLOCKS = [((8, 4), (4, 1)), ((8, 8),), ((8, 1),), ((2, 2), (2, 1), (2, 2)), ((1, 1),)]
VALUES = {"lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}


def grouped(params: list[Parameter]) -> list[dict]:
    return [{"params": params, "blocks": BLOCKS, "role": "matrix"}]


def spans(runs: tuple) -> list[tuple[int, int]]:
    """Runs (rows, rows of one block) -> (first row, row after the last) of each block."""
    found, at = [], 0
    for rows, size in runs:
        found += [(i, i + size) for i in range(at, at + rows, size)]
        at += rows
    return found


def naive(shapes: tuple = SHAPES, blocks: list = BLOCKS, **values: object) -> list[list[Tensor]]:
    params = parameters(shapes=shapes)
    weights, state, seen = [p.detach() for p in params], {}, []
    for step in range(STEPS):
        adam_mini_naive(weights, gradients(params, step), state, [spans(runs) for runs in blocks], step + 1, **values)
        seen.append([w.clone() for w in weights])
    return seen


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("values", [VALUES, {"lr": 0.1, "betas": (0.5, 0.999), "eps": 1e-3}])
def test_it_is_the_loop_over_blocks(values: dict, reuse: bool) -> None:
    ours = trajectory(partial(AdamMini, **values), shapes=SHAPES, grouped=grouped, reuse=reuse)
    assert gap(ours, naive(**values)) < 1e-10
    by_rows = [((12, 1),), *BLOCKS[1:]]
    assert gap(ours, naive(blocks=by_rows, **values)) > 1e-4


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4), st.integers(1, 3))
def test_it_is_the_loop_over_blocks_of_any_size(counts: list[tuple[int, int]], width: int) -> None:
    runs = tuple((n * size, size) for n, size in counts)
    shapes = ((sum(rows for rows, _ in runs), width), (3,))
    blocks = [runs, ((3, 1),)]
    ours = trajectory(partial(AdamMini, **VALUES), shapes=shapes,
                      grouped=lambda params: [{"params": params, "blocks": blocks}])  # fmt: skip
    assert gap(ours, naive(shapes, blocks, **VALUES)) < 1e-10


def test_blocks_of_single_numbers_are_adamw() -> None:
    shapes = ((8,), (5, 1), ())
    ours, adamw = (trajectory(partial(kind, **VALUES), shapes=shapes) for kind in (AdamMini, torch.optim.AdamW))
    assert gap(ours, adamw) < 1e-12


def test_gradients_as_large_all_over_a_block_are_taken_as_by_adamw() -> None:
    """What the paper's reason is the extreme of: within a block one learning rate is enough."""
    signs = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)).sign().double()
    sizes = torch.tensor([1.0, 10.0, 0.1]).repeat_interleave(4)[:, None].double()
    ends = []
    for kind in (AdamMini, torch.optim.AdamW):
        (p,) = parameters(shapes=((12, 8),))
        optimizer = kind([{"params": [p], "blocks": [((12, 4),)]}], **VALUES)
        for step in range(STEPS):
            p.grad = signs * sizes * (1 + step % 3) * (-1) ** (step // 4)
            optimizer.step()
        ends.append(p.detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-12


def test_it_is_the_library_that_goes_by_names() -> None:
    """The oracle knows heads of q_proj and k_proj, a whole tensor as one, and an embedding number by number; in float32."""
    oracle = pytest.importorskip("pytorch_optimizer").AdamMini
    d, n_heads, n_kv = 8, 4, 2
    shapes = {
        "q_proj.weight": (d, d),
        "k_proj.weight": (n_kv * d // n_heads, d),
        "norm.weight": (d,),
        "wte.weight": (d,),
    }
    shapes |= {f"row_{i}.weight": (1, d) for i in range(4)}
    blocks = [((d, d // n_heads),), ((4, d // n_heads),), ((d, d),), ((d, 1),)] + [((1, 1),)] * 4
    theirs = parameters(torch.float32, tuple(shapes.values()))
    named = nn.Module()
    for name, p in zip(shapes, theirs, strict=True):
        part = nn.Module()
        part.weight = p
        named.add_module(name.split(".")[0], part)
    ours = parameters(torch.float32, tuple(shapes.values()))
    values = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    optimizers = [
        (theirs, oracle(named, **values, num_embeds=d, num_heads=n_heads, num_query_groups=n_kv)),
        (ours, AdamMini([{"params": ours, "blocks": blocks}], **values)),
    ]
    for step in range(STEPS):
        for params, optimizer in optimizers:
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
    ends, starts = [[p.detach() for p in ours]], [[p.detach() for p in parameters(shapes=tuple(shapes.values()))]]
    assert gap(ends, [[p.detach() for p in theirs]]) < 2e-6
    assert gap(ends, starts) > 0.3


# ---------------------------------------------------------------------- the blocks of a model


def blocks_by_name(model: nn.Module) -> dict[str, tuple]:
    groups = groups_by_role(model.named_parameters(), model.parameter_roles(), blocks=blocks_of(model))
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: runs for g in groups for p, runs in zip(g["params"], g["blocks"], strict=True)}


@pytest.mark.parametrize("build", VARIANTS.values(), ids=VARIANTS)
def test_the_blocks_of_a_model(build: partial) -> None:
    model = build()
    found = blocks_by_name(model)
    assert {name: sum(rows for rows, _ in runs) for name, runs in found.items()} == {
        name: len(p) for name, p in model.named_parameters()
    }
    part = model.blocks[0].attention.part
    h, qkv = part.heads, "blocks.0.attention.part.qkv.weight"
    assert found.pop(qkv) == ((h.n * h.dim, h.dim), (h.n_kv * h.dim, h.dim), (h.n_kv * h.dim, 1))
    gains = {id(m.weight) for m in model.modules() if type(m).__name__ in ("RMSNorm", "LayerNorm")}
    for name, p in model.named_parameters():
        if not name.endswith("qkv.weight"):
            assert found[name] == ((len(p), len(p) if id(p) in gains else 1),), name


def test_what_decides_is_the_part_and_not_its_name() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(4, 4)
            self.layers = nn.ModuleDict({"bias": RMSNorm(4), "torchs": nn.LayerNorm(4)})
            self.norm = Parameter(torch.zeros(4))

    assert blocks_of(Renamed()) == {"layers.bias.weight": ((4, 4),), "layers.torchs.weight": ((4, 4),)}


def test_the_heads_of_other_attentions() -> None:
    latent = LatentAttention(SITE, 4, SDPA, RMSNorm, kv_rank=12, nope_dim=6, rope_dim=2, v_dim=8)
    assert blocks_of(latent) == {"q.weight": ((32, 8),), "kv_norm.weight": ((12, 12),)}
    latent = LatentAttention(SITE, 4, SDPA, RMSNorm, kv_rank=12, nope_dim=6, rope_dim=2, v_dim=8, q_rank=10)
    assert blocks_of(latent) == {"q.1.weight": ((10, 10),), "q.2.weight": ((32, 8),), "kv_norm.weight": ((12, 12),)}
    low = LowRankAttention(SITE, 4, SDPA, rank=10, n_kv_heads=2, qkv_bias=True)
    assert blocks_of(low) == {"q.weight": ((32, 8),), "kv_up.weight": ((16, 8), (16, 1))}


def test_its_state_is_half_of_adamws() -> None:
    files = [f"{ROOT}/configs/{name}.yaml" for name in ("blagpt", "optim/adam_mini")]
    tree = layers_for([word for file in files for word in ("--config", file)]).tree
    with torch.device("meta"):
        model = model_of(Layers(tree))
    optimizer = model.make_optimizer()
    assert isinstance(optimizer, AdamMini)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for name, x in state.items() if name != "step")
    layers, heads, rows = 12, 16, 256 + 768 + 2 * 3072 + 768  # q and k; v, out, gate and up, down
    gains, biases = 12 * 4 + 1, 12 * (1280 + 768 + 6144 + 768)
    assert kept == 4 * (142_570_752 + layers * (heads + rows) + 50304 + gains + biases)
    assert 0.5 < kept / (8 * 142_570_752) < 0.501


# ---------------------------------------------------------------------- training, resuming, refusing


def test_it_learns_from_a_zero_start() -> None:
    model = tiny(optimizer=partial(AdamMini, lr=3e-3), block=block(attention=attention(qkv_bias=True, out_bias=True)))
    optimizer = model.make_optimizer()
    inputs, targets = batch(model, 8)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.objective(inputs, targets)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_goes_on_bit_by_bit(dtype: torch.dtype) -> None:
    def learn(params: list[Parameter], optimizer: AdamMini, steps: range) -> None:
        for step in steps:
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()

    params = parameters(dtype, SHAPES)
    optimizer = AdamMini(grouped(params), **VALUES)
    learn(params, optimizer, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [Parameter(p.detach().clone()) for p in params]
    other = AdamMini(grouped(others), lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert {s["exp_avg_sq"].dtype for s in other.state.values()} == {torch.promote_types(dtype, torch.float32)}
    learn(params, optimizer, range(6, 12))
    learn(others, other, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
    by_rows = AdamMini(others)
    with pytest.raises(ValueError, match=r"saved state has \(6,\) second moments of a tensor \(12, 8\) \(expected 12"):
        by_rows.load_state_dict(optimizer.state_dict())


def test_parameters_without_a_gradient_stay_and_count_for_themselves() -> None:
    params, twins = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    optimizer = AdamMini(grouped(params), **VALUES)
    alone = [AdamMini([{"params": [p], "blocks": [runs]}], **VALUES) for p, runs in zip(twins, BLOCKS, strict=True)]
    for step in range(6):
        grads = gradients(params, step)
        for i, (p, twin, g) in enumerate(zip(params, twins, grads, strict=True)):
            p.grad, twin.grad = (g, g.clone()) if step % (i + 1) == 0 else (None, None)
            alone[i].step()
        optimizer.step()
    assert all((p - twin).abs().max() < 1e-15 for p, twin in zip(params, twins, strict=True))
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 3, 2, 2, 2]


def test_it_keeps_the_promises_of_an_optimizer() -> None:
    check_promises(partial(AdamMini, **VALUES))


def test_types_can_be_mixed() -> None:
    params = [Parameter(torch.ones(3, 2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16, torch.float32)]
    optimizer = AdamMini(params, **VALUES)
    for chosen in (params, params[:2], params):
        for p in params:
            p.grad = p.detach().clone() if any(p is q for q in chosen) else None
        optimizer.step()
    assert [optimizer.state[p]["exp_avg_sq"].dtype for p in params] == [torch.float64, torch.float32, torch.float32]


def test_strides_do_not_matter() -> None:
    p = Parameter(parameters(shapes=((8, 12),))[0].detach().T)
    twin = Parameter(p.detach().contiguous())
    for x, grad in ((p, p.detach() + 1), (twin, (twin.detach() + 1).T.contiguous().T)):
        x.grad = grad
        AdamMini([{"params": [x], "blocks": [((12, 4),)]}], **VALUES).step()
    assert not p.is_contiguous() and (p - twin).abs().max() < 1e-15


@pytest.mark.parametrize("runs", [((4, 2),), ((4, 2), (1, 1), (1, 2)), ((6, 4),), ((6, 0),), ((7, 1), (-1, 1)), ()])
def test_blocks_that_do_not_fit(runs: tuple) -> None:
    with pytest.raises(ValueError, match=r"AdamMini: blocks .* of a tensor \(6, 2\) .*6 rows in all"):
        AdamMini([{"params": [Parameter(torch.zeros(6, 2))], "blocks": [runs]}])


def test_blocks_of_nothing() -> None:
    p = Parameter(torch.zeros(6, 2))
    with pytest.raises(ValueError, match=r"blocks of 2 tensors for 1"):
        AdamMini([{"params": [p], "blocks": [((6, 1),)] * 2}])
    with pytest.raises(ValueError, match=r"blocks: q .and 0 more. is no parameter"):
        groups_by_role([("p", p)], {"p": "matrix"}, blocks={"q": ((6, 1),)})


@pytest.mark.parametrize("values", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_values_out_of_range(values: dict) -> None:
    (name,) = values
    with pytest.raises(ValueError, match=rf"AdamMini.{name}: .*expected"):
        AdamMini([Parameter(torch.zeros(2))], **values)
