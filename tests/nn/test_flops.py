"""FLOPs as they are counted while a model runs, against formulas written out by hand."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import D, L, T, V, attention, block, carry_of, qk_norm, tiny, tiny_gpt2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.blagpt import BlaGPT
from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.low_rank import LowRankAttention
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.base import Carry, Core, OutputLinear, SequenceMixer, Site, count
from blagpt_pl.nn.flop_rules import attention_flops, flops, is_free
from blagpt_pl.nn.flop_tally import Tally
from blagpt_pl.nn.flops import CannotCount, Flops, count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.mlp_pattention import PattentionMLP
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.weightless import weightless


def structural(model: BlaGPT, context: int) -> int:
    """The twin, from the parameters alone: 6 a weight of a matrix product, 3 a core's word, a token.

    It holds for a model whose every matrix multiplies each token once, the head's once for each time it is applied.
    """
    roles = model.parameter_roles()
    products = sum(p.numel() for name, p in model.named_parameters() if roles[name] == "matrix")
    passes = 1 + sum(term.head_passes for term in model.losses)
    products += passes * sum(p.numel() for p in model.head.parameters() if p.ndim > 1)
    return 6 * products + 3 * sum(core.flops_per_token(context) for core in model.modules() if isinstance(core, Core))


B = 2
H, G, K, FF = 4, 2, 8, 2 * D  # the small baseline: heads, groups, width of a head, hidden width

PROJECTIONS = 2 * (D * (H + 2 * G) * K + H * K * D)  # 2 a weight, a token
READING = T * H * (K + K)  # half of the context, q·k and p·v, 2 each
MIXING = 2 * 3 * D * FF
HEAD = 2 * V * D


def with_attention(part: Callable, **changes: object) -> BlaGPT:
    return tiny(block=block(attention=part), **changes)


latent = partial(LatentAttention, n_heads=4, core=SDPA, norm=RMSNorm, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=5)
latent_rest = 2 * (D * (12 + 4) + 12 * 4 * (6 + 5) + 4 * 5 * D) + T * 4 * (6 + 4 + 5)
pattention = partial(PattentionAttention, n_heads=H, n_kv_heads=G, n_tokens=24, edits=[RoPE], core=SDPA)
dilated = partial(Dilated, segments=[8, 32], dilations=[1, 4])

# Each model, and the FLOPs of its forward pass, a token.
CLOSED = {
    "GPT-2": (tiny_gpt2, L * (2 * (4 * D * D + 2 * D * 4 * D) + T * 2 * D) + HEAD),
    "baseline": (tiny, L * (PROJECTIONS + READING + MIXING) + HEAD),
    "own head": (partial(tiny, head=partial(LinearHead, bias=True)), L * (PROJECTIONS + READING + MIXING) + HEAD),
    "token bias": (partial(tiny, token_bias=True), L * (PROJECTIONS + READING + MIXING) + HEAD),
    "z-loss": (partial(tiny, losses=[ZLoss]), L * (PROJECTIONS + READING + MIXING) + HEAD),
    "dropout": (
        partial(tiny, dropout=0.1, block=block(dropout=0.1, attention=attention(core=partial(SDPA, dropout=0.1)))),
        L * (PROJECTIONS + READING + MIXING) + HEAD,
    ),
    "capped logits": (partial(tiny, head=partial(TiedHead, softcap=30.0)), L * (PROJECTIONS + READING + MIXING) + HEAD),
    "capped scores": (
        partial(with_attention, attention(core=SoftCapped)),
        L * (PROJECTIONS + READING + MIXING) + HEAD,
    ),
    "more norms, shifted keys": (
        partial(tiny, block=block(post_norm=RMSNorm, attention=attention(edits=[qk_norm, RoPE, KVShift]))),
        L * (PROJECTIONS + READING + MIXING) + HEAD,
    ),
    "one kv head": (
        partial(with_attention, attention(n_kv_heads=1)),
        L * (2 * (D * (H + 2) * K + H * K * D) + READING + MIXING) + HEAD,
    ),
    "MLA": (partial(with_attention, latent), L * (2 * D * 4 * (6 + 4) + latent_rest + MIXING) + HEAD),
    "MLA with a low rank of queries": (
        partial(with_attention, partial(latent, q_rank=10)),
        L * (2 * (D * 10 + 10 * 4 * (6 + 4)) + latent_rest + MIXING) + HEAD,
    ),
    "low rank": (
        partial(with_attention, partial(LowRankAttention, n_heads=H, n_kv_heads=G, rank=6, core=SDPA)),
        L * (2 * (D * H * K + D * 6 + 6 * 2 * G * K + H * K * D) + READING + MIXING) + HEAD,
    ),
    # each head reads 4 segments of 8 rows, and one of the 8 rows that it keeps of all: 8 · 9 / 2 pairs each
    "dilated": (
        partial(with_attention, attention(core=dilated)),
        L * (PROJECTIONS + H * 2 * (K + K) * (4 + 1) * 36 // T + MIXING) + HEAD,
    ),
    "TokenFormer": (
        partial(tiny, block=block(attention=pattention, mlp=partial(PattentionMLP, n_tokens=40))),
        L * (2 * (24 * (D + H * K) + 2 * 24 * (D + G * K) + 24 * (H * K + D) + 40 * 2 * D) + READING) + HEAD,
    ),
    "three tokens ahead": (
        partial(tiny, losses=[partial(MultiToken, n=3)]),
        (L + 2) * (PROJECTIONS + READING + MIXING) + 3 * HEAD,
    ),
}


@pytest.mark.parametrize("name", CLOSED)
def test_forward_and_backward_are_the_closed_formula(name: str) -> None:
    build, forward = CLOSED[name]
    model = build()
    found = count_flops(model, T, B)
    assert found.uncounted == {}
    assert found.tokens == B * T
    assert (found.forward_per_token, found.backward_per_token, found.per_token) == (forward, 2 * forward, 3 * forward)
    assert found.per_token == structural(model, T) == model.flops_per_token()


def test_another_context_and_batch() -> None:
    """Only what reads grows with the context; the batch changes nothing a token."""
    model = tiny()
    for context, batch in [(T, 1), (T // 2, 3), (8, 1), (7, 2)]:
        forward = L * (PROJECTIONS + context * H * 2 * K + MIXING) + HEAD
        found = count_flops(model, context, batch)
        assert found.per_token == 3 * forward
        assert sum(found.forward.values()) == batch * context * forward


def test_the_baseline_at_its_full_size() -> None:
    """As one line of arithmetic; six a parameter is close, and not it: a table that is tied is read and multiplied."""
    parts = block(
        attention=attention(n_heads=12, n_kv_heads=4, edits=[qk_norm, RoPE], qkv_bias=True, out_bias=True),
        mlp=partial(GatedMLP, activation=SiLU, ratio=4, bias=True),
    )
    with torch.device("meta"):
        model = tiny(vocab_size=50304, context=1024, d_model=768, n_layers=12, block=parts)
    found = count_flops(model, 1024)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    n = count(model.parameters()) - vectors
    assert found.per_token == 6 * n + 12 * 6 * 1024 * 768 == 911_278_080
    assert (found.forward_per_token, found.backward_per_token) == (303_759_360, 607_518_720)
    assert found.uncounted == {}


# ---------------------------------------------------------------------- whose they are


def test_every_flop_is_its_modules() -> None:
    found = count_flops(tiny(), T, B)
    tokens = B * T
    of_block = {
        "attention.part.core": READING,
        "attention.part.qkv": 2 * D * (H + 2 * G) * K,
        "attention.part.out": 2 * H * K * D,
        "mlp.part.gate_up": 2 * D * 2 * FF,
        "mlp.part.down": 2 * FF * D,
    }
    forward = {f"blocks.{i}.{name}": n * tokens for i in range(L) for name, n in of_block.items()} | {
        "head": HEAD * tokens
    }
    assert found.forward == forward
    assert found.backward == {path: 2 * n for path, n in forward.items()}


def test_one_wider_mlp_changes_its_own_numbers_alone() -> None:
    def wide_first(site: Site) -> GatedMLP:
        return GatedMLP(site, SiLU, ratio=4 if site.layer == 0 else 2)

    before, after = count_flops(tiny(), T), count_flops(tiny(block=block(mlp=wide_first)), T)
    for a, b in ((before.forward, after.forward), (before.backward, after.backward)):
        changed = {path for path in a if b[path] != a[path]}
        assert changed == {"blocks.0.mlp.part.gate_up", "blocks.0.mlp.part.down"}
        assert all(b[path] == 2 * a[path] for path in changed)


def test_heads_of_multi_token_prediction_are_told_apart() -> None:
    found = count_flops(tiny(losses=[partial(MultiToken, n=3)]), T)
    assert found.forward["head"] == 3 * HEAD * T
    assert found.backward["head"] == 2 * 3 * HEAD * T
    for path in ("losses.0.blocks.0", "losses.0.blocks.1"):
        assert sum(n for p, n in found.forward.items() if p.startswith(path)) == (PROJECTIONS + READING + MIXING) * T
        assert (
            sum(n for p, n in found.backward.items() if p.startswith(path)) == 2 * (PROJECTIONS + READING + MIXING) * T
        )


def test_what_is_frozen_costs_what_is_left() -> None:
    """Nothing below block 1 needs a gradient: no backward below, none of its input, and none of the frozen weight."""
    model = tiny(head=LinearHead)
    model.requires_grad_(False)
    for part in (model.blocks[1], model.head):
        part.requires_grad_(True)
    model.blocks[1].mlp.part.down.weight.requires_grad_(False)
    model.blocks[1].attention.norm.requires_grad_(False)
    found = count_flops(model, T)
    once = found.forward
    assert sum(once.values()) == T * (L * (PROJECTIONS + READING + MIXING) + HEAD)
    times = {
        "attention.part.core": 2,
        "attention.part.qkv": 1,
        "attention.part.out": 2,
        "mlp.part.gate_up": 2,
        "mlp.part.down": 1,
    }
    expected = {f"blocks.1.{name}": n * once[f"blocks.1.{name}"] for name, n in times.items()}
    assert found.backward == {**expected, "head.linear": 2 * once["head.linear"]}


def test_a_model_that_learns_nothing_has_the_backward_of_the_loss_alone() -> None:
    found = count_flops(tiny().requires_grad_(False), T)
    assert found.backward == {"head": HEAD * T}  # made with the loss, by the features; never by the frozen table


# ---------------------------------------------------------------------- sequence mixers that are not attention


def part_of(
    build: Callable[[nn.Module, Site], None], run: Callable[[nn.Module, Tensor], Tensor], **methods: Callable
) -> type:
    """A sequence mixer: what it owns, what it computes, and what else it says."""

    def __init__(self: nn.Module, site: Site) -> None:
        SequenceMixer.__init__(self)
        build(self, site)

    def forward(self: nn.Module, x: Tensor, carry: Carry) -> Tensor:
        return run(self, x)

    return type("Mixer", (SequenceMixer,), {"__init__": __init__, "forward": forward, **methods})


def nothing(self: nn.Module, site: Site) -> None:
    pass


def owns_linear(self: nn.Module, site: Site) -> None:
    self.linear = nn.Linear(site.d_model, site.d_model)


def mixing(part: Callable, **changes: object) -> tuple[int, int, Flops]:
    """Forward and backward FLOPs a token of a mixer in the place of attention, with what it owns."""
    found = count_flops(tiny(n_layers=1, block=block(attention=part), **changes), T, B)
    at = "blocks.0.attention.part"
    return *(
        sum(n for p, n in side.items() if p.startswith(at)) // found.tokens for side in (found.forward, found.backward)
    ), found


CHUNK = 8


def linear_attention(self: nn.Module, x: Tensor) -> Tensor:
    """y_t = Σ_{s ≤ t} (q_t · k_s) v_s, by chunks: within a chunk as scores, before it as a running sum of v kᵀ."""
    q, k, v = self.qkv(x).unflatten(1, (-1, CHUNK)).chunk(3, -1)  # (B, N, C, D)
    inside = torch.einsum("bnid,bnjd->bnij", q, k).tril()  # (B, N, C, C)
    states = torch.einsum("bnjd,bnje->bnde", k, v).cumsum(1).roll(1, 1)  # (B, N, D, D)
    y = inside @ v + torch.einsum("bnid,bnde->bnie", q, states)
    return self.out(y.flatten(1, 2))


def owns_projections(self: nn.Module, site: Site) -> None:
    self.qkv = nn.Linear(site.d_model, 3 * site.d_model)
    self.out = OutputLinear(site.d_model, site.d_model)


def test_a_linear_recurrence_in_chunks() -> None:
    """Projections 4 D²; scores and their values C D each a token; a state made and read, D² each; 2 a multiply-add."""
    forward, backward, found = mixing(part_of(owns_projections, linear_attention))
    assert forward == 2 * (4 * D * D + 2 * CHUNK * D + 2 * D * D)
    assert backward == 2 * forward
    assert found.uncounted == {}


def test_a_part_that_says_what_it_costs_is_taken_at_its_word() -> None:
    said = part_of(owns_projections, linear_attention, flops_per_token=lambda self, context: 1000 + context)
    forward, backward, found = mixing(said)
    assert (forward, backward) == (1000 + T, 2 * (1000 + T))
    assert [p for p in found.forward if "attention" in p] == ["blocks.0.attention.part"]  # nothing of what it owns


def test_a_word_stands_for_gradients_that_are_taken_in_the_forward_too() -> None:
    def descends(self: nn.Module, x: Tensor) -> Tensor:
        w = self.linear.weight
        (step,) = torch.autograd.grad((x @ w).square().sum(), w, create_graph=True)
        return x @ (w - step)

    assert mixing(part_of(owns_linear, descends, flops_per_token=lambda self, context: 9))[:2] == (9, 18)
    assert mixing(part_of(owns_linear, descends))[0] == 2 * 2 * D * D  # x @ w twice; its gradient is backward


def test_a_word_is_for_the_tokens_it_is_called_on() -> None:
    """A part that is called on pieces of the sequence: each call has its own length."""
    inner = part_of(nothing, lambda self, x: 2 * x, flops_per_token=lambda self, context: 10 * context)

    def halves(self: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([self.inner(half, carry_of(half)) for half in x.split(T // 2, 1)], 1)

    def owns(self: nn.Module, site: Site) -> None:
        self.inner = inner(site)

    assert mixing(part_of(owns, halves))[:2] == (10 * T // 2, 2 * 10 * T // 2)


def test_words_that_are_none() -> None:
    """Not said: counted by what runs. No whole number: refused."""

    class Silent(Core):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).tril() @ v

    def silent(at: object) -> Core:
        return Silent()

    full = T * 2 * 2 * H * K  # all pairs: that is what runs
    found = count_flops(tiny(n_layers=1, block=block(attention=attention(n_kv_heads=None, core=silent))), T)
    assert found.forward["blocks.0.attention.part.core"] == full * T
    with pytest.raises(
        ValueError, match=r"^model\.blocks\.0\.attention\.part: flops_per_token\(32\) is 0\.5 \(expected a whole"
    ):
        mixing(part_of(nothing, lambda self, x: x, flops_per_token=lambda self, context: 0.5))


def test_a_convolution() -> None:
    """Depthwise and causal, 4 taps a channel; what the padding adds beyond the end is computed and dropped."""

    def owns(self: nn.Module, site: Site) -> None:
        self.conv = nn.Conv1d(site.d_model, site.d_model, 4, groups=site.d_model)

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.mT, (3, 0))).mT

    assert mixing(part_of(owns, run))[:2] == (2 * 4 * D, 2 * 2 * 4 * D)

    def owns_frozen(self: nn.Module, site: Site) -> None:
        owns(self, site)
        self.conv.requires_grad_(False)

    assert mixing(part_of(owns_frozen, run))[:2] == (2 * 4 * D, 2 * 4 * D)


def test_convolutions_of_every_kind_are_their_matrix() -> None:
    """Twice the pairs of an output and an input number that touch, each counted by probing a naive twin."""
    for groups, stride, transposed in [(1, 1, False), (4, 1, False), (2, 3, False), (1, 2, True), (4, 2, True)]:
        kind = F.conv_transpose1d if transposed else F.conv1d
        weight = torch.ones(8, 12 // groups, 5) if transposed else torch.ones(12, 8 // groups, 5)
        x = torch.ones(1, 8, 23)
        pairs = int(kind(x, weight, stride=stride, groups=groups).sum())  # each touching pair adds 1
        part = part_of(nothing, lambda self, x, w=weight, k=kind, s=stride, g=groups: x + run_conv(x, w, k, s, g))
        assert mixing(part)[2].forward["blocks.0.attention.part"] == 2 * pairs


def run_conv(x: Tensor, weight: Tensor, kind: Callable, stride: int, groups: int) -> Tensor:
    y = kind(x.new_zeros(1, 8, 23), torch.empty_like(weight, device=x.device), stride=stride, groups=groups)
    return y.sum()


@pytest.mark.parametrize("causal", [False, True])
def test_torchs_attention_outside_of_a_core(causal: bool) -> None:
    """By its formula, however it is reached, and not by the T × T matrices it is made of where no kernel runs."""

    def run(self: nn.Module, x: Tensor) -> Tensor:
        return imported_by_name(x, x, x[..., : D // 2], is_causal=causal).repeat(1, 1, 2)

    pairs = T // 2 if causal else T
    assert mixing(part_of(nothing, run))[:2] == (2 * pairs * (D + D // 2), 4 * pairs * (D + D // 2))


imported_by_name = F.scaled_dot_product_attention


def test_torchs_multi_head_attention() -> None:
    def owns(self: nn.Module, site: Site) -> None:
        self.heads = nn.MultiheadAttention(site.d_model, 4, batch_first=True)

    def run(self: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=x.device)
        return self.heads(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0]

    forward, backward, found = mixing(part_of(owns, run))
    assert (forward, backward) == (2 * 4 * D * D + T * 2 * D, 2 * (2 * 4 * D * D + T * 2 * D))
    assert found.uncounted == {}
    assert F.scaled_dot_product_attention is imported_by_name  # put back


def test_what_runs_in_training_alone_is_seen() -> None:
    run = lambda self, x: self.linear(self.linear(x)) if self.training else self.linear(x)
    model = tiny(n_layers=1, block=block(attention=part_of(owns_linear, run))).eval()
    assert count_flops(model, T).forward["blocks.0.attention.part.linear"] == 2 * 2 * D * D * T


def test_what_runs_without_gradients_has_no_backward() -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(x)

    assert mixing(part_of(owns_linear, run))[:2] == (2 * D * D, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_adds_a_forward_to_the_backward(reentrant: bool) -> None:
    def run(self: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda y: self.linear(y).tanh(), x, use_reentrant=reentrant)

    assert mixing(part_of(owns_linear, run))[:2] == (2 * D * D, 3 * 2 * D * D)

    def owns_two(self: nn.Module, site: Site) -> None:
        self.linear, self.wide = nn.Linear(D, D), nn.Linear(D, 7 * D)

    def run_two(self: nn.Module, x: Tensor) -> Tensor:
        return x * checkpoint(lambda y: self.wide(self.linear(y).tanh()), x, use_reentrant=reentrant).mean()

    found = mixing(part_of(owns_two, run_two))[2]
    forward, backward = (side["blocks.0.attention.part.linear"] for side in (found.forward, found.backward))
    assert backward == 3 * forward  # run again while the one above it is being differentiated, and still its own


class Squared(torch.autograd.Function):
    """x xᵀ x, with a backward pass of its own that multiplies five times."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.mT @ x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad @ (x.mT @ x) + (x @ grad.mT) @ x + x @ (x.mT @ grad) * 0


def test_a_backward_written_by_hand() -> None:
    once = 2 * T * D  # a token of (T, D) (D, T), and of every other product here up to the two of (D, T) (T, D)
    forward, backward, _ = mixing(part_of(nothing, lambda self, x: Squared.apply(x)))
    assert forward == 2 * once
    assert backward == 2 * once + 4 * 2 * D * D


# ---------------------------------------------------------------------- what has no rule


@torch.library.custom_op("test_flops::scan", mutates_args=())
def foreign_scan(x: Tensor) -> Tensor:
    """An operation of another library."""
    return x.cumsum(1)


@foreign_scan.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


foreign_scan.register_autograd(lambda ctx, grad: foreign_scan(grad.flip(1)).flip(1))


def test_an_unknown_operation_is_listed_and_never_a_silent_zero() -> None:
    model = with_attention(part_of(nothing, lambda self, x: foreign_scan(x)))
    assert count_flops(model, T).uncounted == {"test_flops::scan": 2 * L}
    said = part_of(nothing, lambda self, x: foreign_scan(x), flops_per_token=lambda self, context: 7)
    assert mixing(said)[:2] == (7, 14)
    assert mixing(said)[2].uncounted == {}


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (lambda x: x.sort(-1).values + x.topk(1).values, {"aten::sort", "aten::topk"}),
        (lambda x: torch.fft.fft(x, dim=1).real, {"aten::_fft_r2c", "aten::_fft_c2c"}),
        (lambda x: torch.cdist(x, x)[..., :1] + x, {"aten::_euclidean_dist"}),
        (lambda x: x @ torch.linalg.inv(x.new_zeros(D, D)), {"aten::linalg_inv_ex", "aten::_linalg_check_errors"}),
        (lambda x: F.avg_pool1d(x.mT, 3, 1, 1).mT, {"aten::avg_pool2d", "aten::avg_pool2d_backward"}),
    ],
)
def test_operations_of_torch_without_a_rule(run: Callable, names: set[str]) -> None:
    assert set(mixing(part_of(nothing, lambda self, x: run(x)))[2].uncounted) == names


FREE = [
    F.gelu,
    F.silu,
    F.elu,
    F.softplus,
    F.hardswish,
    F.logsigmoid,
    F.mish,
    partial(F.layer_norm, normalized_shape=(D,)),
    partial(F.rms_norm, normalized_shape=(D,)),
    partial(F.group_norm, num_groups=T),
    partial(F.dropout, p=0.5),
    lambda x: F.glu(torch.cat([x, x], -1)),
    lambda x: x.softmax(-1),
    lambda x: x.cumsum(1),
    lambda x: x.cumprod(1),
    lambda x: x.logcumsumexp(1),
    lambda x: x - x.logsumexp(-1, keepdim=True),
    lambda x: x / x.norm(),
    lambda x: x.std() * x,
    lambda x: torch.complex(x, x).abs(),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: x.tril(),
    lambda x: x.flip(1),
    lambda x: F.pad(x, (0, 0, 1, 0))[:, 1:],
    lambda x: x[:, torch.arange(T)],
    lambda x: x.roll(1, 1),
    lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.int64)),
    lambda x: x.index_add(1, torch.zeros(1).long(), x[:, :1]),
    lambda x: x.repeat_interleave(2, 1)[:, ::2],
    lambda x: x + F.one_hot(torch.zeros(T).long(), D),
    lambda x: x.amax() * x,
    lambda x: torch._foreach_mul([x], 2.0)[0],
    lambda x: x + torch.randn(D),
    lambda x: x.unfold(1, 4, 1).sum() + x,
]


def test_what_is_free_by_convention() -> None:
    part = part_of(nothing, lambda self, x: sum(f(x) for f in FREE))
    forward, backward, found = mixing(part)
    assert (forward, backward, found.uncounted) == (0, 0, {})


def test_no_product_is_free() -> None:
    aten = torch.ops.aten
    for name in (
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "mv",
        "dot",
        "convolution",
        "addbmm",
        "_scaled_mm",
        "_trilinear",
        "sort",
    ):
        assert not is_free(getattr(aten, name).default if name != "sort" else aten.sort.stable), name


def test_products_are_those_of_torchs_own_counter() -> None:
    a, b, v = torch.randn(3, 5, 7), torch.randn(3, 7, 4), torch.randn(7)
    w, image = torch.randn(6, 5, 3), torch.randn(3, 5, 20)
    for run in (
        lambda: a @ b,
        lambda: torch.baddbmm(torch.ones(3, 5, 4), a, b),
        lambda: F.linear(a, b[0].T, torch.ones(4)),
        lambda: F.conv1d(image, w, stride=2, padding=1),
        lambda: F.conv_transpose1d(image, w.transpose(0, 1).contiguous()),
    ):
        with FlopCounterMode(display=False) as theirs:
            run()
        with Recorded() as calls:
            run()
        assert sum(calls.flops) == theirs.get_total_flops() > 0
    with Recorded() as calls:
        a[0] @ v
        v @ v
        a.cfloat() @ b.cfloat()
    assert sum(calls.flops) == 2 * 5 * 7 + 2 * 7 + 8 * 3 * 5 * 7 * 4


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """The rules alone, on tensors with data."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: list[int] = []

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        self.flops.append(flops(func, args, out) or 0)
        return out


# ---------------------------------------------------------------------- what cannot be counted


@pytest.mark.parametrize(
    ("run", "operation"),
    [
        (lambda x: x * x.sum().item(), ": aten::_local_scalar_dense"),
        (lambda x: x if x.sum() > 0 else -x, ": aten::_local_scalar_dense"),
        (lambda x: x + x[x > 0].sum(), ": aten::index"),
        (lambda x: x + float(x.detach().sum().numpy()), ""),
        (lambda x: x + torch.ones(D, device="cpu"), ": aten::add"),
    ],
)
def test_a_model_that_needs_data_is_told_where(run: Callable, operation: str) -> None:
    with pytest.raises(CannotCount) as told:
        mixing(part_of(nothing, lambda self, x: run(x)))
    message = str(told.value)
    assert message.startswith(f"model.blocks.0.attention.part{operation}: does not run on tensors without elements (")
    assert "\n" not in message
    assert F.scaled_dot_product_attention is imported_by_name


def test_a_model_that_cannot_be_copied_is_told() -> None:
    class Sharded(BlaGPT):
        def __deepcopy__(self, memo: dict) -> "Sharded":
            raise AssertionError("no copies")

    model = tiny()
    model.__class__ = Sharded
    with pytest.raises(
        CannotCount, match=r"cannot be copied \(AssertionError: no copies\); fix: count before .* sharded"
    ):
        count_flops(model, T)


# ---------------------------------------------------------------------- what it leaves


class Trainer:
    def __deepcopy__(self, memo: dict) -> "Trainer":
        raise AssertionError("a trainer is not copied")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_model_is_left_as_it_was(mode: Callable) -> None:
    model = tiny(dropout=0.1, losses=[partial(MultiToken, n=2)]).train()
    model.blocks[0].eval()
    model._trainer = Trainer()
    kept, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    objects, rng = [id(p) for p in model.parameters()], torch.get_rng_state()
    attributes = [set(vars(m)) for m in model.modules()]
    with mode():
        assert count_flops(model, T).per_token == model.flops_per_token()
    assert isinstance(model._trainer, Trainer)
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert [id(p) for p in model.parameters()] == objects
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_compiled_model_is_counted_and_nothing_is_compiled() -> None:
    compiled: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        compiled.append(graph)
        return graph

    model = tiny(compile=backend)
    model.configure_model()
    assert count_flops(model, T).per_token == tiny().flops_per_token()
    within = part_of(owns_linear, lambda self, x: torch.compile(self.linear, backend=backend, fullgraph=True)(x))
    assert mixing(within)[:2] == (2 * D * D, 2 * 2 * D * D)
    assert not compiled


def test_a_copy_without_weights() -> None:
    """Ties, what is frozen and what is merely held survive; elements do not."""
    model = tiny()
    model.blocks[0].requires_grad_(False)
    model.table = torch.ones(3, 2)
    model.register_buffer("known", torch.ones(4, dtype=torch.int16), persistent=False)
    model.loose = torch.ones(2, requires_grad=True)
    model.held = {"again": [model.table, model.head.weight]}
    twin = weightless(model)
    assert {t.device.type for t in (*twin.parameters(), *twin.buffers(), twin.table)} == {"meta"}
    assert twin.head.weight is twin.embedding.weight is twin.held["again"][1]
    assert twin.held["again"][0] is twin.table
    assert (twin.known.shape, twin.known.dtype, twin.table.shape) == ((4,), torch.int16, (3, 2))
    pairs = zip(model.named_parameters(), twin.named_parameters(), strict=True)
    assert all(
        (a, p.shape, p.dtype, p.requires_grad) == (b, q.shape, q.dtype, q.requires_grad) for (a, p), (b, q) in pairs
    )
    assert count(twin.parameters()) == count(model.parameters())
    assert twin.loose.requires_grad
    assert twin.device.type == "meta"
    assert count_flops(twin, T).per_token == count_flops(model, T).per_token


def test_a_share_is_rounded_up() -> None:
    """Lower bounds are lower bounds of the total; a token's share never hides an operation."""
    found = Flops({"a": 7}, {"a": 6}, {}, 4)
    assert (found.forward_per_token, found.backward_per_token, found.per_token) == (2, 2, 4)


def test_an_operation_of_another_library_is_never_free_by_its_name() -> None:
    @torch.library.custom_op("flops_test::sum", mutates_args=())
    def total(x: Tensor) -> Tensor:
        return x.sum(-1)

    assert not is_free(torch.ops.flops_test.sum.default)


def test_attention_between_two_lengths_is_all_pairs() -> None:
    q, k = torch.empty(1, 2, 3, 4), torch.empty(1, 2, 7, 4)
    assert attention_flops(q, k, k) == 2 * 3 * 7 * (4 + 4) * 2


def test_the_place_is_that_of_its_error() -> None:
    tally = Tally()
    tally._fail(ValueError("one"), "blocks.0")
    assert tally.place_of(ValueError("other")) == ""


def test_a_lower_bound_is_no_number_for_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Flops({"": 10}, {"": 20}, {"aten::sort": 1}, 1)
    monkeypatch.setattr("blagpt_pl.lm.count_flops", lambda *args: found)
    assert tiny().flops_per_token() is None
