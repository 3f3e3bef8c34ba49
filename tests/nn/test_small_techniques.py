"""The techniques that the house's parts already do: the size of each overlay, and that it is what its name says."""

from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import attention, batch, block, carry_of, qk_norm, shake, tiny
from torch import Tensor, nn

from blagpt_pl.lab import parts
from blagpt_pl.lab.layers import from_arguments
from blagpt_pl.lab.train import BlagptCLI
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import count
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.norm import LayerNorm, RMSNorm

ROOT = Path(__file__).resolve().parents[2]
BASELINE = 142_570_752
D, L, V, H, G, K, F = 768, 12, 50304, 12, 4, 64, 3072
SIZES = {  # parameters that an overlay adds to the baseline, as its page says
    "kv_shift": L * 4 * G,
    "token_bias": V * D,
    "qkv_bias": -L * (D + 2 * F + D),
    "rope_base": 0,
    "layernorm": (2 * L + 1) * D,
    "dropout": 0,
    "learned_positions": 1024 * D,
    "nope": 0,
    "gelu": -L * (D * F + F),
    "geglu": 0,
    "relu2": -L * (D * F + F),
    "mha": L * 2 * (H - G) * (D * K + K),
    "mqa": L * 2 * (1 - G) * (D * K + K),
    "untied": V * D,
    "no_qk_norm": -L * 2 * K,
}
SMALL = [
    "--model.vocab_size", "61", "--model.d_model", "48", "--model.n_layers", "2", "--model.compile", "null",
    "--data.context", "32", "--data.batch_size", "4", "--data.device_batch_size", "4",
]  # fmt: skip


def built(*overlays: str, small: bool) -> BlaGPT:
    """The baseline's configuration under overlays; at its full size without memory, or small."""
    parts.import_all()
    files = [ROOT / "configs/blagpt.yaml", *(ROOT / f"configs/techniques/{name}.yaml" for name in overlays)]
    words = [word for file in files for word in ("--config", str(file))]
    tree = from_arguments(words + (SMALL if small else [])).tree
    for key in ("callbacks", "precision"):
        tree["trainer"].pop(key, None)
    with torch.device("cpu" if small else "meta"):
        torch.manual_seed(0)
        return BlagptCLI("fit", tree, run=False).model


@cache
def baseline() -> BlaGPT:
    return shake(built(small=True))


def outputs(model: BlaGPT) -> Tensor:
    """Logits in train mode, from the same dice."""
    torch.manual_seed(1)
    return model.train()(batch(model)[0])


def part_of(overlay: str, branch: str) -> nn.Module:
    """The attention or MLP of the first block under an overlay, in float64, moved off its start."""
    return getattr(shake(built(overlay, small=True)).double().blocks[0], branch).part


# ---------------------------------------------------------------------- each overlay is a difference


@pytest.mark.parametrize("overlay", SIZES)
def test_an_overlay_has_the_size_its_page_says(overlay: str) -> None:
    n = count(built(overlay, small=False).parameters())
    assert n == BASELINE + SIZES[overlay]
    pages = [page.read_text() for page in (ROOT / "docs/techniques").glob("*.md")]
    (page,) = (
        text for text in pages if any(f"/{overlay}.yaml" in line for line in text.splitlines() if "Overlay" in line)
    )
    assert f"{n:,}" in page, f"{n:,} is not on the page of {overlay}"


def test_many_overlays_add_up() -> None:
    model = built("kv_shift", "nope", "mqa", "layernorm", "relu2", "token_bias", "untied", "dropout", small=False)
    found = model.blocks[0].attention.part
    assert [type(edit).__name__ for edit in found.edits] == ["KVShift", "QKNorm"]
    assert found.edits[0].k_now.shape == (1,)
    shift = SIZES["kv_shift"] // G  # of one key/value head
    others = ("nope", "mqa", "layernorm", "relu2", "token_bias", "untied", "dropout")
    assert count(model.parameters()) == BASELINE + shift + sum(SIZES[name] for name in others)


# ---------------------------------------------------------------------- biases, norms, base of RoPE


def test_qkv_bias_is_on_queries_keys_and_values_alone() -> None:
    model = built("qkv_bias", small=True)
    with_bias = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if getattr(m, "bias", None) is not None}
    assert with_bias == {"qkv"}


def test_layernorm_is_everywhere_but_in_qk_norm() -> None:
    model = built("layernorm", small=True)
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, LayerNorm | RMSNorm)}
    assert {kind for name, kind in kinds.items() if ".edits." in name} == {RMSNorm}
    others = [kind for name, kind in kinds.items() if ".edits." not in name]
    assert others == [LayerNorm] * (2 * 2 + 1)


def test_layernorm_ignores_a_shift_of_its_input() -> None:
    """The difference to RMSNorm in one line."""
    x = torch.randn(2, 5, 48)
    assert (LayerNorm(48)(x + 3) - LayerNorm(48)(x)).abs().max() < 1e-5
    assert (RMSNorm(48)(x + 3) - RMSNorm(48)(x)).abs().max() > 0.1


def test_a_larger_base_turns_the_slow_pairs_slower() -> None:
    edits = [m.blocks[0].attention.part.edits for m in (baseline(), built("rope_base", small=True))]
    assert [list(map(type, e)) for e in edits] == [list(map(type, edits[0]))] * 2
    assert [e[1].theta for e in edits] == [1e4, 1e6]


# ---------------------------------------------------------------------- where a token stands


def one_layer(edits: list, n_layers: int = 1, **changes: object) -> BlaGPT:
    return shake(tiny(n_layers=n_layers, block=block(attention=attention(edits=edits)), **changes), std=0.2).eval()


def moved_by_a_swap(model: BlaGPT) -> float:
    """How far the last logits move when two earlier tokens change places."""
    tokens, _ = batch(model, size=2, length=13)
    swapped = tokens.clone()
    swapped[:, [2, 7]] = tokens[:, [7, 2]]
    assert not torch.equal(tokens, swapped)
    return (model(tokens)[:, -1] - model(swapped)[:, -1]).abs().max().item()


def test_without_positions_one_layer_reads_the_past_as_a_set() -> None:
    assert moved_by_a_swap(one_layer([qk_norm])) < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        lambda: one_layer([qk_norm, RoPE]),
        lambda: one_layer([qk_norm], positions=LearnedPositions),
        lambda: one_layer([KVShift, qk_norm]),
        lambda: one_layer([qk_norm], n_layers=2),
    ],
    ids=["RoPE", "learned positions", "KV-shifting", "a second layer"],
)
def test_order_comes_from(model) -> None:
    """Two layers without positions know the order, since the first one's outputs have seen different pasts."""
    assert moved_by_a_swap(model()) > 1e-3


def test_nope_is_the_baseline_without_its_rotation() -> None:
    model = built("nope", small=True)
    assert model.positions is None
    assert not [m for m in model.modules() if isinstance(m, RoPE)]
    model.load_state_dict(baseline().state_dict(), strict=True)  # RoPE has no parameters
    assert (model.eval()(batch(model)[0]) - baseline().eval()(batch(model)[0])).abs().max() > 1e-3


def test_learned_positions_replace_rope() -> None:
    model = shake(built("learned_positions", small=True)).eval()
    assert isinstance(model.positions, LearnedPositions)
    assert not [m for m in model.modules() if isinstance(m, RoPE)]
    tokens = torch.full((1, 13), 5)
    x, _ = model.trunk(tokens)
    assert model.parameter_roles()["positions.table.weight"] == "embedding"
    embedded = model.embedding(tokens) + model.positions.table.weight[:13]
    _, carry = model.trunk(tokens)
    assert torch.equal(carry.x0, embedded)
    assert (x[:, 1:] - x[:, :1]).abs().amax(-1).min() > 1e-3  # the same token, other places


# ---------------------------------------------------------------------- dropout


def test_dropout_is_random_in_training_and_seeded() -> None:
    model = shake(built("dropout", small=True))
    tokens, _ = batch(model)
    assert torch.equal(outputs(model), outputs(model))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    baseline().eval()
    model.load_state_dict(baseline().state_dict())
    assert torch.equal(model(tokens), baseline()(tokens))


def test_dropout_stands_at_the_embeddings_and_at_every_branch() -> None:
    model = built("dropout", small=True)
    drops = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    branches = {f"blocks.{i}.{branch}.drop": 0.1 for i in range(2) for branch in ("attention", "mlp")}
    assert drops == {"drop": 0.1, **branches}
    assert {m.dropout for m in model.modules() if hasattr(m, "dropout") and hasattr(m, "flops_per_token")} == {0.0}


# ---------------------------------------------------------------------- MLPs, heads


def phi(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def phi_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("overlay", "act"), [("gelu", phi_tanh), ("relu2", lambda x: torch.where(x > 0, x * x, 0.0))], ids=["gelu", "relu2"]
)
def test_a_plain_mlp_is_its_formula(overlay: str, act) -> None:
    part, x = part_of(overlay, "mlp"), torch.randn(2, 5, 48, dtype=torch.float64)
    assert part.up.weight.shape == (4 * 48, 48)
    expected = act(x @ part.up.weight.T + part.up.bias) @ part.down.weight.T + part.down.bias
    assert (part(x, carry_of(x)) - expected).abs().max() < 1e-12
    spoilt = x.relu() @ part.up.weight.T + part.up.bias
    assert (part(x, carry_of(x)) - act(spoilt) @ part.down.weight.T - part.down.bias).abs().max() > 1e-3


def test_geglu_is_its_formula() -> None:
    part, x = part_of("geglu", "mlp"), torch.randn(2, 5, 48, dtype=torch.float64)
    gate, up = (x @ w.T + b for w, b in zip(part.gate_up.weight.chunk(2), part.gate_up.bias.chunk(2), strict=True))
    expected = phi(gate) * up @ part.down.weight.T + part.down.bias
    assert (part(x, carry_of(x)) - expected).abs().max() < 1e-12
    other = gate * torch.sigmoid(gate) * up @ part.down.weight.T + part.down.bias
    assert (part(x, carry_of(x)) - other).abs().max() > 1e-4


@pytest.mark.parametrize(("overlay", "n_kv"), [("mha", 12), ("mqa", 1)])
def test_key_value_heads(overlay: str, n_kv: int) -> None:
    part = part_of(overlay, "attention")
    assert part.heads.n == 12
    assert part.heads.n_kv == n_kv
    x = torch.randn(2, 5, 48, dtype=torch.float64)
    q, k, v = part.project(x)
    assert [y.shape[1] for y in (q, k, v)] == [12, n_kv, n_kv]


def test_an_untied_head_has_a_matrix_of_its_own() -> None:
    model = built("untied", small=True)
    roles = model.parameter_roles()
    assert roles["head.linear.weight"] == "head"
    assert roles["embedding.weight"] == "embedding"
    assert model.head.linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    model.objective(*batch(model))[0].backward()
    assert model.embedding.weight.grad.any(1).sum() <= batch(model)[0].unique().numel()  # rows that were read, alone


def test_no_qk_norm_leaves_rope() -> None:
    assert [type(edit) for edit in built("no_qk_norm", small=True).blocks[0].attention.part.edits] == [RoPE]
