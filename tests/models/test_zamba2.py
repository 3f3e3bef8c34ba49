"""Zamba2: equal to transformers' and to its layers written out, with each use's own adapters; size and cost by formula."""

import copy
from functools import partial

import pytest
import torch
from helpers import D, Graphs, T, V, adamw, batch, check_variant, shake
from naive_zamba2 import zamba2 as naive
from shipped import BASELINE, MODELS, built
from torch import Tensor, nn
from transformers import Zamba2Config, Zamba2ForCausalLM

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.zamba2 import Zamba2
from blagpt_pl.nn.activation import GELU
from blagpt_pl.nn.adapters import Adapters
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.shared import SharedAttention
from blagpt_pl.nn.base import count
from blagpt_pl.nn.block import SoloBlock
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.memory import RecomputeBlocks
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.recurrent.rwkv7 import RWKV7TimeMix
from blagpt_pl.nn.roles import blocks_of, splits_of
from blagpt_pl.nn.shared_block import SharedBlock, TakingUp
from blagpt_pl.nn.states import States
from blagpt_pl.optim.schedule import Constant

H, R, N, P, L = 4, 6, 8, 16, 8  # heads, rank, state, channels of a Mamba head, its chunk
ORDER = "mgggm"  # three uses of two blocks: the third is the first one's again
rms = partial(RMSNorm, eps=1e-5)
mamba = partial(Mamba2, d_state=N, head_dim=P, chunk=L, dt_min=1e-3)


def small(rope: bool = False, adapted: bool = False, **changes: object) -> Zamba2:
    """Every kind of layer, and a block that is used twice; any argument can be changed."""
    attention = partial(SharedAttention, n_heads=H, norm=rms, core=SDPA, edits=[RoPE] * rope, adapted=adapted)
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "order": ORDER, "mamba": mamba,
        "shared": partial(SharedBlock, attention=attention, norm=rms, activation=GELU, ratio=3), "n_shared": 2,
        "adapter_rank": R, "norm": rms, "head": TiedHead, "init": GPT2Init(zero_outputs=True), "optimizer": adamw,
        "schedule": Constant,
    }  # fmt: skip
    return Zamba2(**{**arguments, **changes})


def exact(**changes: object) -> Zamba2:
    """In float64, off its start."""
    return shake(small(**changes), 0.2).double().eval()


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


BOTH = pytest.mark.parametrize(("rope", "adapted"), [(False, False), (True, True), (False, True), (True, False)])

# ---------------------------------------------------------------------- transformers' model


@torch.no_grad()
def theirs(model: Zamba2, rope: bool, adapted: bool) -> Zamba2ForCausalLM:
    """transformers' model with the weights of ours; they have all rows of q, k and v in matrices of their own."""
    kinds = {"m": "linear_attention", "g": "hybrid"}
    config = Zamba2Config(
        vocab_size=V, hidden_size=D, num_hidden_layers=len(model.order), intermediate_size=3 * D, mamba_d_state=N,
        n_mamba_heads=2 * D // P, chunk_size=L, num_attention_heads=H, num_mem_blocks=len(model.shared), adapter_rank=R,
        layers_block_type=[kinds[letter] for letter in model.order], use_mem_rope=rope,
        use_shared_attention_adapter=adapted, attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    other = Zamba2ForCausalLM(config).eval()
    other.model.embed_tokens.weight.copy_(model.embedding.weight)
    other.model.final_layernorm.weight.copy_(model.norm.weight)
    uses = 0
    for letter, mine, layer in zip(model.order, model.layers, other.model.layers, strict=True):
        if letter == "m":
            copy_mamba(mine.branch.part, mine.branch.norm, layer)
            continue
        block, use = model.shared[uses % len(model.shared)], model.adapters[uses]
        copy_mamba(mine.mixer, mine.norm, layer.mamba_decoder)
        layer.linear.weight.copy_(mine.enter.weight)
        shared, heads, mlp = (layer.shared_transformer, block.attention, layer.shared_transformer.feed_forward)
        shared.input_layernorm.weight.copy_(heads.norm.weight)
        shared.pre_ff_layernorm.weight.copy_(block.norm.weight)
        for name, rows in zip("qkv", heads.qkv.weight.chunk(3), strict=True):
            getattr(shared.self_attn, f"{name}_proj").weight.copy_(rows)
            if adapted:
                copy_adapter(use, name, getattr(shared.self_attn, f"linear_{name}_adapter_list")[uses])
        shared.self_attn.o_proj.weight.copy_(heads.out.weight)
        mlp.gate_up_proj.weight.copy_(block.gate_up.weight)
        mlp.down_proj.weight.copy_(block.down.weight)
        copy_adapter(use, "gate_up", mlp.gate_up_proj_adapter_list[uses])
        uses += 1
    return other


def copy_mamba(mine: Mamba2, norm: nn.Module, layer: nn.Module) -> None:
    layer.input_layernorm.weight.copy_(norm.weight)
    part = layer.mamba
    part.in_proj.weight.copy_(mine.proj.weight)
    part.conv1d.weight.copy_(mine.conv.weight[:, None])
    part.conv1d.bias.copy_(mine.conv.bias)
    for name in ("dt_bias", "A_log", "D"):
        getattr(part, name).copy_(getattr(mine, name))
    part.norm.weight.copy_(mine.norm.weight)
    part.out_proj.weight.copy_(mine.out.weight)


def copy_adapter(use: Adapters, name: str, adapter: nn.Module) -> None:
    adapter[0].weight.copy_(use.down[name].weight)
    adapter[1].weight.copy_(use.up[name].weight)


@BOTH
def test_it_is_transformers(rope: bool, adapted: bool) -> None:
    model = shake(small(rope, adapted), 0.1).eval()
    tokens = tokens_of(21)
    with torch.no_grad():
        y, found = model(tokens), theirs(model, rope, adapted)(tokens).logits
    assert y.abs().max() > 1
    assert (y - found).abs().max() < 1e-5
    assert count(theirs(model, rope, adapted).parameters()) == count(model.parameters())


# ---------------------------------------------------------------------- its layers, written out


def largest_gap(model: Zamba2, length: int, bug: str = "") -> float:
    """Between the model and its layers written out: of the logits, and of every parameter's gradient, next to its size."""
    tokens, found = tokens_of(length), []
    weights = torch.randn(2, length, V, dtype=torch.float64)
    for y in (model(tokens), naive(model, tokens, bug)):
        grads = torch.autograd.grad((y * weights).sum(), [*model.parameters()], allow_unused=True)
        found.append([y, *(torch.zeros(()) if g is None else g for g in grads)])
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(*found, strict=True))


@BOTH
@pytest.mark.parametrize("length", [1, 13, 16])
def test_it_is_its_layers(rope: bool, adapted: bool, length: int) -> None:
    assert largest_gap(exact(rope=rope, adapted=adapted), length) < 1e-10


@pytest.mark.parametrize(("order", "n_shared"), [("g", 1), ("ggm", 1), ("mgmg", 2), ("gggg", 3)])
def test_any_order_is_its_layers(order: str, n_shared: int) -> None:
    assert largest_gap(exact(order=order, n_shared=n_shared), 7) < 1e-10


@pytest.mark.parametrize("bug", ["order", "scale", "residual", "residual within", "use", "turns"])
def test_a_mistake_is_noticed(bug: str) -> None:
    assert largest_gap(exact(), 13, bug) > 1e-3


def test_pieces_are_the_whole() -> None:
    model, tokens = exact(rope=True, adapted=True), tokens_of(23)
    whole = model(tokens)
    assert model.can_continue()
    for pieces in ([1] * 23, [5, 7, 1, 10], [1, 22]):
        states, found = States(), []
        for piece in tokens.split(pieces, dim=1):
            found.append(model.head(model.finish(*model.trunk(piece, states))))
            states = states.after(piece.shape[1])
        assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-10
        assert states.grows


# ---------------------------------------------------------------------- regions


def test_a_block_is_one_graph_for_all_of_its_uses() -> None:
    """Compiled, or recomputed, it computes the same; no use has a graph of its own."""
    inputs, targets = batch(small())
    model = shake(small(adapted=True, order="mgg", n_shared=1, memory=RecomputeBlocks())).double()
    forms = [model, copy.deepcopy(model), copy.deepcopy(model)]
    torch._dynamo.reset()
    seen, found = Graphs(), []
    forms[1].apply_memory_policy()
    forms[2].compile_regions(seen)
    for form in forms:
        total, _ = form.objective(inputs, targets)
        found.append([total, *torch.autograd.grad(total, [*form.parameters()])])
    torch._dynamo.reset()
    for other in found[1:]:
        assert max((a - b).abs().max().item() for a, b in zip(found[0], other, strict=True)) < 1e-10
    assert sum("scaled_dot_product_attention" in code for code in seen.seen) == 1


def test_regions_own_all_that_lies_between() -> None:
    model = small(adapted=True, token_bias=True)
    regions = [p for region in model.regions() for p in region.parameters()]
    around = nn.ModuleList([model.embedding, *model.readout()])
    assert len({*map(id, regions)}) == len(regions)
    assert count(regions) + count(around.parameters()) == count(model.parameters())
    assert {*map(id, regions)}.isdisjoint(map(id, around.parameters()))


def test_layers_stand_where_the_word_says() -> None:
    model = small(order="mgmgg")
    assert [type(layer) for layer in model.layers] == [SoloBlock, TakingUp, SoloBlock, TakingUp, TakingUp]
    assert len(model.shared) == 2 and len(model.adapters) == 3
    assert [block.attention.heads.site.layer for block in model.shared] == [1, 3]
    assert {(block.attention.heads.dim, block.attention.heads.site.n_layers) for block in model.shared} == {(16, 5)}


# ---------------------------------------------------------------------- what is refused, how it starts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ""}, r"model.order: empty \(expected a letter a layer: m \(model.mamba\), g"),
        ({"order": "mag"}, "model.order: layer 1 of 'mag' is 'a'"),
        ({"order": "mm"}, r"model.n_shared: 2, but 0 layers of model.order 'mm' are g.*BlaGPT with SoloBlock"),
        ({"order": "mg"}, "model.n_shared: 2, but 1 layers"),
        ({"n_shared": 0}, r"model.n_shared: 0 \(expected 1 or more\)"),
        ({"adapter_rank": 0}, r"model.adapter_rank: 0 \(expected 1 or more\)"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_heads_and_attentions_that_do_not_fit_are_refused() -> None:
    shared = partial(SharedBlock, norm=rms, activation=GELU)
    attention = partial(SharedAttention, norm=rms, core=SDPA)
    with pytest.raises(
        ValueError, match=r"n_heads: 5 do not go into 2 · d_model = 64; nearby counts that do: \[1, 2, 4, 8"
    ):
        small(shared=partial(shared, attention=partial(attention, n_heads=5)))
    with pytest.raises(ValueError, match=r"Attention does not read the embeddings .*expected SharedAttention"):
        small(shared=partial(shared, attention=partial(Attention, n_heads=4, core=SDPA)))
    with pytest.raises(ValueError, match=r"SharedBlock.ratio: 0.001 leaves no hidden number"):
        small(shared=partial(shared, attention=partial(attention, n_heads=4), ratio=0.001))


def test_a_zero_start_leaves_the_stream_alone_and_the_shared_blocks_speak() -> None:
    model, tokens = small(adapted=True), tokens_of(13)
    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))
    for module in (*model.shared.modules(), *model.adapters.modules()):
        if isinstance(module, nn.Linear):
            assert 0.01 < module.weight.std() < 0.03


def test_roles_and_stacks() -> None:
    model = small(adapted=True)
    roles, splits = model.parameter_roles(), splits_of(model)
    own = {name.rpartition(".")[2] for name, role in roles.items() if role == "recurrence"}
    assert own == {"A_log", "dt_bias", "D", "weight", "bias"}
    assert {role for name, role in roles.items() if name.startswith("adapters")} == {"matrix"}
    assert splits["adapters.0.up.gate_up.weight"] == splits["shared.0.gate_up.weight"] == (3 * D, 3 * D)
    assert splits["shared.1.attention.qkv.weight"] == (2 * D, 2 * D, 2 * D)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope": True, "order": "mgg"},
        {
            "adapted": True, "token_bias": True, "dropout": 0.1, "losses": [ZLoss, partial(MultiToken, n=3)],
            "head": partial(LinearHead, softcap=3.0), "order": "mgg", "init": GPT2Init(zero_outputs=False),
        },
    ],
    ids=["plain", "with all additions, g last"],
)  # fmt: skip
def test_promises(changes: dict) -> None:
    """The others take long, and are examined with the shipped configuration by `blagpt check`."""
    assert all(v.state == "kept" for v in check_variant(small(**changes)))


# ---------------------------------------------------------------------- size and cost


def parameters(order: str, d: int, n: int, p: int, f: int, n_shared: int, rank: int, vocabulary: int, qkv: bool) -> int:
    inner, uses = 2 * d, order.count("g")
    a_mamba = d * (2 * inner + 2 * n + inner // p) + 5 * (inner + 2 * n) + 3 * (inner // p) + inner + inner * d + d
    a_block = 3 * (2 * d) ** 2 + 2 * d * d + 2 * d + d + d * 2 * f + f * d
    a_use = (3 * 2 * 2 * d * rank if qkv else 0) + d * rank + 2 * f * rank + d * d
    return vocabulary * d + len(order) * a_mamba + n_shared * a_block + uses * a_use + d


def forward(
    order: str, t: int, d: int, n: int, p: int, chunk: int, f: int, rank: int, vocabulary: int, qkv: bool
) -> int:
    """FLOPs a token, of a sequence that the chunk divides; 2 a weight, half of the pairs."""
    inner, uses = 2 * d, order.count("g")
    heads = inner // p
    a_mamba = 2 * d * (3 * inner + 2 * n + heads) + heads * (2 * chunk * p + 4 * p * n) + 2 * chunk * n
    a_block = 2 * (3 * (2 * d) ** 2 + 2 * d * d + 3 * d * f) + t * 2 * 2 * d
    a_use = 2 * ((3 * 2 * 2 * d * rank if qkv else 0) + d * rank + 2 * f * rank + d * d)
    return 2 * vocabulary * d + len(order) * a_mamba + uses * (a_block + a_use)


@pytest.mark.parametrize("adapted", [False, True])
def test_size_and_cost_by_formula(adapted: bool) -> None:
    model = small(adapted=adapted)
    assert count(model.parameters()) == parameters(ORDER, D, N, P, 3 * D, 2, R, V, adapted)
    flops = count_flops(model, T)
    assert not flops.uncounted
    assert flops.forward_per_token == forward(ORDER, T, D, N, P, L, 3 * D, R, V, adapted)
    assert sum(flops.backward.values()) == 2 * sum(flops.forward.values())


def test_the_shipped_one_has_139_728_144() -> None:
    model = built(BASELINE.name, "--config", str(MODELS["zamba2"])).model
    order = "mmmmmgmmmmmgmmmmmg"
    assert model.order == order
    assert count(model.parameters()) == parameters(order, 768, 64, 64, 3072, 2, 128, 50304, False) == 139_728_144
    never_built = [*model.shared.parameters(), *model.adapters.parameters()]
    never_built += [p for layer in model.layers if isinstance(layer, TakingUp) for p in layer.enter.parameters()]
    assert count(never_built) == 35_099_136
    flops = count_flops(model, 1024)
    assert flops.forward_per_token == forward(order, 1024, 768, 64, 64, 64, 3072, 128, 50304, False) == 329_932_800
    assert flops.per_token == 989_798_400


@pytest.mark.parametrize("order", ["mgm", "gmm", "mmg"])
def test_what_a_layer_leaves_in_the_memo_reaches_later_ones(order: str) -> None:
    model = shake(small(order=order, n_shared=1, mamba=partial(RWKV7TimeMix, head_dim=8)), 0.1)
    assert model(tokens_of(13)).isfinite().all()


def test_rows_of_queries_and_keys_act_as_heads() -> None:
    blocks, width, head = blocks_of(small(adapted=True)), 2 * D, 2 * D // H
    assert blocks["shared.0.attention.qkv.weight"] == ((width, head), (width, head), (width, 1))
    assert [blocks.get(f"adapters.0.up.{name}.weight") for name in "qkv"] == [((width, head),)] * 2 + [None]
