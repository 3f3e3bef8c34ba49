"""Rene: equal to its layers written out, its kinds in their places, and its size and cost by formula."""

from functools import partial

import pytest
import torch
from helpers import D, T, V, adamw, batch, check_variant, shake
from naive_zamba2 import rene as naive
from shipped import BASELINE, MODELS, built
from torch import Tensor

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.rene import Rene
from blagpt_pl.nn.activation import GELU
from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_window import Windowed
from blagpt_pl.nn.base import count
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.mlp import MLP
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.recurrent.mamba2 import Mamba2
from blagpt_pl.nn.states import States
from blagpt_pl.optim.schedule import Constant

H, W, N, P, L = 4, 5, 6, 16, 8  # heads, window, state, channels of a Mamba head, its chunk
mamba = partial(Mamba2, d_state=N, head_dim=P, chunk=L, norm_before_gate=True)
attention = partial(Attention, n_heads=H, core=partial(Windowed, window=W), qkv_bias=True, out_bias=True)
mlp = partial(MLP, activation=GELU, ratio=3, bias=True)


def small(**changes: object) -> Rene:
    """Every kind once at least; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "order": "mfamf", "norm": partial(RMSNorm, eps=1e-5),
        "mamba": mamba, "attention": attention, "mlp": mlp, "head": TiedHead, "init": GPT2Init(zero_outputs=True),
        "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return Rene(**{**arguments, **changes})


def exact(**changes: object) -> Rene:
    """In float64, off its start."""
    return shake(small(**changes), 0.2).double().eval()


def tokens_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


# ---------------------------------------------------------------------- its layers, written out


def largest_gap(model: Rene, length: int, bug: str = "") -> float:
    """Between the model and its layers written out: of the logits, and of every parameter's gradient."""
    tokens, found = tokens_of(length), []
    weights = torch.randn(2, length, V, dtype=torch.float64)
    for y in (model(tokens), naive(model, tokens, bug)):
        found.append([y, *torch.autograd.grad((y * weights).sum(), [*model.parameters()])])
    return max((a - b).abs().max().item() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("length", [1, 4, 13, 16])
def test_it_is_its_layers(length: int) -> None:
    assert largest_gap(exact(), length) < 1e-10


@pytest.mark.parametrize(
    ("order", "changes"),
    [
        ("a", {"mamba": None, "mlp": None}),
        ("mm", {"attention": None, "mlp": None, "mamba": partial(mamba, norm_before_gate=False, n_groups=2)}),
        ("fam", {}),
    ],
)
def test_any_order_is_its_layers(order: str, changes: dict) -> None:
    assert largest_gap(exact(order=order, **changes), 11) < 1e-10


@pytest.mark.parametrize("bug", ["positions", "window", "residual"])
def test_a_mistake_is_noticed(bug: str) -> None:
    assert largest_gap(exact(), 13, bug) > 1e-3


def test_pieces_are_the_whole() -> None:
    model, tokens = exact(), tokens_of(23)
    whole = model(tokens)
    assert model.can_continue()
    for pieces in ([1] * 23, [5, 7, 1, 10], [1, 22]):
        states, found = States(), []
        for piece in tokens.split(pieces, dim=1):
            found.append(model.head(model.finish(*model.trunk(piece, states))))
            states = states.after(piece.shape[1])
        assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-10
        assert not states.grows  # its attention has a window


# ---------------------------------------------------------------------- what it is made of


def test_kinds_stand_where_the_word_says() -> None:
    model = small(order="fmamfm")
    kinds = {"m": Mamba2, "a": Attention, "f": MLP}
    assert [type(block.branch.part) for block in model.blocks] == [kinds[letter] for letter in "fmamfm"]
    (site,) = (b.branch.part.heads.site for b in model.blocks if isinstance(b.branch.part, Attention))
    assert (site.layer, site.n_layers, site.context) == (2, 6, T)
    assert list(model.regions()) == list(model.blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": ""}, r"model.order: empty \(expected a letter a layer: m \(model.mamba\), a \(model.attention\)"),
        ({"order": "mfxa"}, r"model.order: layer 2 of 'mfxa' is 'x' \(expected one of m"),
        ({"order": "mM"}, "layer 1 of 'mM' is 'M'"),
        ({"mlp": None}, "model.mlp: empty, but model.order 'mfamf' has 'f'"),
        ({"order": "mf"}, "model.attention: no effect, since no layer of model.order 'mf' is 'a'; fix: null, or a"),
    ],
)
def test_letters_and_sockets_go_together(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_a_zero_start_leaves_the_stream_alone() -> None:
    model, tokens = small(), tokens_of(13)
    assert torch.equal(model(tokens), model.head(model.norm(model.embedding(tokens))))


def test_what_drives_the_recurrence_is_neither_decayed_nor_orthogonalised() -> None:
    roles = small().parameter_roles()
    own = {name.rpartition("part.")[2] for name, role in roles.items() if role == "recurrence"}
    assert own == {"A_log", "dt_bias", "D", "conv.weight", "conv.bias"}
    assert {roles[f"blocks.0.branch.part.{name}.weight"] for name in ("proj", "out")} == {"matrix"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "token_bias": True, "dropout": 0.1, "losses": [ZLoss, partial(MultiToken, n=3)],
            "head": partial(LinearHead, softcap=3.0), "order": "fma", "init": GPT2Init(zero_outputs=False),
        },
    ],
    ids=["plain", "with all additions"],
)  # fmt: skip
def test_promises(changes: dict) -> None:
    """The others take long, and are examined with the shipped configuration by `blagpt check`."""
    verdicts = check_variant(small(**changes))
    assert {v.promise for v in verdicts if v.state != "kept"} <= {"long memory"}


def test_further_heads_own_a_block_of_the_last_kind() -> None:
    (term,) = small(losses=[partial(MultiToken, n=3)]).losses
    assert [type(block.branch.part) for block in term.blocks] == [MLP, MLP]
    inputs, targets = batch(small())
    total, parts = small(losses=[partial(MultiToken, n=3)]).objective(inputs, targets)
    assert total.isfinite() and {*parts} == {"loss", "multi_token_2", "multi_token_3"}


# ---------------------------------------------------------------------- size and cost


def parameters(order: str, d: int, n: int, p: int, vocabulary: int) -> int:
    inner = 2 * d
    a_mamba = d * (2 * inner + 2 * n + inner // p) + 5 * (inner + 2 * n) + 3 * (inner // p) + inner + inner * d
    kinds = {"m": a_mamba, "a": 4 * d * d + 4 * d, "f": 6 * d * d + 4 * d}
    return vocabulary * d + sum(kinds[letter] + d for letter in order) + d


def forward(order: str, length: int, d: int, n: int, p: int, chunk: int, window: int, vocabulary: int) -> int:
    """FLOPs of a sequence that the chunk divides; 2 a weight and pair."""
    inner = 2 * d
    heads = inner // p
    a_mamba = 2 * d * (3 * inner + 2 * n + heads) + heads * (2 * chunk * p + 4 * p * n) + 2 * chunk * n
    pairs = window * (window + 1) // 2 + (length - window) * window
    kinds = {"m": length * a_mamba, "a": length * 8 * d * d + 4 * d * pairs, "f": length * 12 * d * d}
    return length * 2 * vocabulary * d + sum(kinds[letter] for letter in order)


def test_size_and_cost_by_formula() -> None:
    model = small()
    assert count(model.parameters()) == parameters("mfamf", D, N, P, V)
    flops = count_flops(model, T)
    expected = forward("mfamf", T, D, N, P, L, W, V)
    assert not flops.uncounted
    assert sum(flops.forward.values()) == pytest.approx(expected, rel=1e-3)  # pairs of a window: a whole number a token
    assert abs(sum(flops.forward.values()) - expected) < T


def test_the_shipped_one_has_127_105_440() -> None:
    model = built(BASELINE.name, "--config", str(MODELS["rene"])).model
    order = "mmfmmfamfmmf"
    assert count(model.parameters()) == parameters(order, 1024, 128, 64, 50304) == 127_105_440
    assert model.order == order and order.count("m") == 7
    flops = count_flops(model, 1024)
    assert flops.per_token == 791_200_512
    assert flops.forward_per_token == pytest.approx(forward(order, 1024, 1024, 128, 64, 64, 128, 50304) / 1024, abs=1)


def test_without_a_window_attention_reads_all() -> None:
    model, other = exact(attention=partial(attention, core=SDPA)), exact()
    other.load_state_dict(model.state_dict())
    gap = (model(tokens_of(13)) - other(tokens_of(13))).abs().amax((0, 2))
    assert gap[:W].max() < 1e-12 and gap[W:].min() > 1e-4
