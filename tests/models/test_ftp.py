"""FTP is a loop over positions, each with a decoder run of its own; what its slots know, what they weigh, what they cost."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import V, adamw, attention, batch, block, check_variant, shake
from shipped import MODELS, built
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.lab.memory import step_memory
from blagpt_pl.lab.predict import work_of
from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.ftp import FTP
from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.block import Branch
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.roles import splits_of
from blagpt_pl.nn.stack import through
from blagpt_pl.optim.schedule import Constant

D, H, G, FF = 16, 2, 1, 32  # width of the stream, heads, groups, hidden width
N, P, T = 3, 4, 24  # slots, vectors of a state, context
ENCODER, DECODER = 2, 1
small_block = partial(block, attention=attention(n_heads=H, n_kv_heads=G))


def ftp(**changes: object) -> FTP:
    """Small; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "n_layers": ENCODER, "n_decoder_layers": DECODER, "future": N, "pseudo": P,
        "gamma": 0.8, "block": small_block(), "cross": partial(CrossAttention, n_heads=H, qk_norm=RMSNorm), "norm": RMSNorm,
        "head": TiedHead, "init": GPT2Init(zero_outputs=True), "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return FTP(**{**arguments, **changes})


def exact(**changes: object) -> FTP:
    """In float64, off its start."""
    return shake(ftp(**changes), 0.2).double().eval()


# ---------------------------------------------------------------------- the loop


def read(branch: Branch, x: Tensor, context: Tensor) -> Tensor:
    """Cross-attention from its definition: every score, no kernel."""
    part = branch.part.cross
    h, g = part.heads.n, part.heads.n_kv
    q = part.q_norm((branch.norm(x) @ part.q.weight.T).unflatten(-1, (h, -1)))  # (B, n, H, K)
    k, v = ((context @ w.T).unflatten(-1, (g, -1)).repeat_interleave(h // g, 2) for w in part.kv.weight.chunk(2))
    scores = torch.einsum("bnhk,bphk->bhnp", q, part.k_norm(k)) / q.shape[-1] ** 0.5
    y = torch.einsum("bhnp,bphk->bnhk", scores.softmax(-1), v).flatten(2)
    return x + y @ part.out.weight.T


def state(model: FTP, past: Tensor) -> Tensor:
    """h_t (B, D) of a past x_0 ... x_t, and of nothing else."""
    x = model.embedding.weight[past]
    if model.positions is not None:
        x = x + model.positions.table.weight[: past.shape[1]]
    return model.encoder_norm(through(model.encoder, x, Carry(past, x)))[:, -1]


def one_run(model: FTP, h: Tensor, slots: Tensor) -> Tensor:
    """The decoder over as many slots (B, n) as there are tokens, with one state h (B, D): logits (B, n, V)."""
    context = torch.stack([h @ w.T for w in model.expand.weight.chunk(model.pseudo)], 1)  # (B, P, D)
    x = model.embedding.weight[slots] + model.slots.table.weight[: slots.shape[1]]
    carry = Carry(slots, x)
    for layer in model.decoder:
        first, *rest = layer.block.branches()
        x = read(layer.cross, first(x, carry), context)
        for branch in rest:
            x = branch(x, carry)
    x = model.norm(x)
    return model.head(x if model.token_bias is None else x + model.token_bias.weight[slots])


def loop(model: FTP, tokens: Tensor) -> dict[tuple[int, int], Tensor]:
    """Logits (B, V) by position and slot, of the slots whose token is there."""
    found = {}
    for t in range(tokens.shape[1]):
        logits = one_run(model, state(model, tokens[:, : t + 1]), tokens[:, t : t + model.future])
        found |= {(t, n): logits[:, n] for n in range(logits.shape[1])}
    return found


def losses(model: FTP, logits: dict[tuple[int, int], Tensor], targets: Tensor, gamma: float) -> list[Tensor]:
    """The weighted mean of each slot over the targets that count."""
    found = []
    for n in range(model.future):
        rows = [(z, targets[:, t + n]) for (t, slot), z in logits.items() if slot == n]
        if rows:
            each = [F.cross_entropy(z, y, ignore_index=IGNORE, reduction="none") for z, y in rows]
            found.append(gamma**n * torch.cat(each).sum() / sum((y != IGNORE).sum() for _, y in rows))
    return found


VARIANTS = {
    "as it is": {},
    "own head, learned positions, token bias": {
        "head": partial(LinearHead, bias=True), "positions": LearnedPositions, "token_bias": True, "gamma": 0.5,
    },
    "grouped, unnormed, two decoder blocks": {
        "cross": partial(CrossAttention, n_heads=4, n_kv_heads=2), "n_decoder_layers": 2, "n_layers": 1, "gamma": 1.0, "pseudo": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_equals_a_loop_over_positions(changes: dict, length: int) -> None:
    """Logits of every slot, each part of the loss, every gradient; with some targets that count nowhere."""
    model = exact(**changes)
    tokens, targets = batch(model, 2, length)
    targets = targets.clone()
    targets[0, 1] = IGNORE
    expected = loop(model, tokens)
    logits = model.head(model.foretold(tokens, N))
    assert logits.shape == (2, length, N, V)
    assert max((logits[:, t, n] - z).abs().max() for (t, n), z in expected.items()) < 1e-10
    assert (model(tokens) - logits[:, :, 0]).abs().max() < 1e-10
    found = []
    parts_expected = losses(model, expected, targets, changes.get("gamma", 0.8))
    total, parts = model.objective(tokens, targets)
    assert list(parts) == ["loss", "future_2", "future_3"]
    for value in (total, sum(parts_expected)):
        model.zero_grad()
        value.backward()
        found.append([value, *(p.grad for p in model.parameters())])
    assert all(abs(a - b) < 1e-10 for a, b in zip(parts.values(), parts_expected, strict=False))
    assert not any(list(parts.values())[len(parts_expected) :])  # no target is left
    assert len(parts_expected) == min(N, length)
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-10


# ---------------------------------------------------------------------- who knows what


def moved(run: Callable[[Tensor], Tensor], length: int) -> Tensor:
    """(T, T, N): at [s, t, n], how far the logits of slot n at t move with token s."""
    one = torch.randint(V, (length,))
    rows = torch.where(torch.eye(length, dtype=torch.bool), (one + 1) % V, one)  # (T, T)
    with torch.no_grad():
        return (run(rows) - run(one[None])).abs().amax(-1)


def test_a_slot_sees_the_past_and_the_slots_before_it() -> None:
    model, length = exact(), 11
    reach = moved(lambda tokens: model.head(model.foretold(tokens, N)), length)
    for t in range(length):
        for n in range(min(N, length - t)):
            assert not reach[t + n + 1 :, t, n].any()
            assert reach[: t + n + 1, t, n].min() > 1e-9


def test_nothing_but_the_state_reaches_the_decoder() -> None:
    """With all states held fast, a slot sees the tokens of its own run and no other: the past comes by h alone."""
    model, length = exact(), 11
    states = torch.randn(length, D, dtype=torch.float64)
    model.encoder_norm.register_forward_hook(lambda *_: states.expand(len(_[2]), -1, -1))
    reach = moved(lambda tokens: model.head(model.foretold(tokens, N)), length)
    for t in range(length):
        for n in range(min(N, length - t)):
            own = torch.arange(t, t + n + 1)
            others = [s for s in range(length) if s not in own]
            assert not reach[others, t, n].any()
            assert reach[own, t, n].min() > 1e-9


def test_measuring_and_generating_run_one_slot_a_token_and_training_all() -> None:
    model, shapes = shake(ftp(dropout=0.2)), []
    model.decoder[0].register_forward_hook(lambda _, args, y: shapes.append(tuple(args[0].shape)))
    tokens, targets = batch(model, 2, 9)
    for training in (False, True):
        model.train(training)
        logits = []
        for run in (lambda: model(tokens), lambda: model.head(model.foretold(tokens, N)[:, :, 0])):
            torch.manual_seed(3)
            logits.append(run())
        gap = (logits[0] - logits[1]).abs().max()
        assert gap == 0 if training else gap < 1e-5
    model.eval().measure(tokens, targets)
    model.generate(tokens[:1, :5], 1)
    assert shapes == [(18, 1, D), *[(18, N, D)] * 3, (18, 1, D), (5, 1, D)]


# ---------------------------------------------------------------------- what is learnt


def test_targets_are_on_the_diagonal_and_none_lies_beyond_the_end() -> None:
    model = ftp()
    tokens, targets = batch(model, 2, 5)
    lesson = model.lesson(tokens, targets)
    assert lesson.features.shape == (2, 5, N, D)
    assert lesson.targets.shape == (2, 5, N, N)
    for t in range(5):
        for n in range(N):
            for column in range(N):
                y = targets[:, t + n] if n == column and t + n < 5 else torch.full((2,), IGNORE)
                assert torch.equal(lesson.targets[:, t, n, column], y)
    assert lesson.weights == [1.0, 0.8, 0.8**2]
    assert lesson.names == ["future_2", "future_3"]


def test_what_stands_beyond_the_end_moves_nothing() -> None:
    """Neither loss nor gradient: the padding's embedding is made to be noise."""
    model = exact(token_bias=True)
    noisy = copy.deepcopy(model)
    tokens, targets = batch(model, 2, 5)
    tokens, targets = tokens.clamp(min=1), targets.clamp(min=1)  # 0 is the padding's token
    with torch.no_grad():
        noisy.token_bias.weight[0] += 3.0
    found = []
    for m in (model, noisy):
        total, _ = m.objective(tokens, targets)
        total.backward()
        found.append((total.detach(), m.token_bias.weight.grad[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert not found[0][1].any()


def test_the_ruler_and_the_z_loss_read_the_next_token_alone() -> None:
    model = exact(losses=[partial(ZLoss, weight=0.1)])
    tokens, targets = batch(model, 2, 9)
    logits = model(tokens)
    total, parts = model.objective(tokens, targets)
    assert list(parts) == ["loss", "future_2", "future_3", "z_loss"]
    assert abs(parts["z_loss"] - 0.1 * logits.logsumexp(-1).square().mean()) < 1e-10
    assert abs(total - sum(parts.values())) < 1e-10
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert abs(model.measure(tokens, targets) - nats) < 1e-9
    assert abs(parts["loss"] - nats / 18) < 1e-10


def test_it_learns_the_tokens_ahead() -> None:
    """On a sequence that counts upwards every slot's loss falls far below ln V."""
    model = ftp(n_layers=1)
    tokens = (torch.arange(17) + torch.arange(8)[:, None] * 7) % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        total, parts = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
    assert max(parts[f"future_{n}"] / 0.8 ** (n - 1) for n in (2, 3)) < 1
    assert parts["loss"] < 1


# ---------------------------------------------------------------------- the contract


def test_promises() -> None:
    """With all that can be added; as it is shipped, and compiled, `tests/lab/test_check.py` examines it."""
    added = {
        "dropout": 0.1,
        "block": small_block(dropout=0.1, post_norm=RMSNorm),
        "token_bias": True,
        "losses": [ZLoss],
    }
    check_variant(ftp(d_model=32, n_layers=1, **added))


def test_dropout_acts_in_training_only() -> None:
    model = shake(ftp(dropout=0.3))
    tokens, _ = batch(model)
    assert not torch.equal(model.train()(tokens), model(tokens))
    assert torch.equal(model.eval()(tokens), model(tokens))


def test_one_table_embeds_for_both_and_the_last_norm_is_not_the_encoders() -> None:
    model = ftp()
    names = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    assert names == {"embedding", "slots.table"}
    assert model.encoder_norm is not model.norm
    assert splits_of(model)["expand.weight"] == (D,) * P  # an optimizer of matrices takes each vector's map alone
    assert [m.layer for m in (layer.attention.part.heads.site for layer in model.encoder)] == [0, 1]
    site = model.decoder[0].block.attention.part.heads.site
    assert (site.layer, site.n_layers, site.context) == (ENCODER, ENCODER + DECODER, N)
    assert list(model.regions()) == [*model.encoder, *model.decoder]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"future": 1}, r"model\.future: 1 \(expected 2 to 24, the context\)"),
        ({"future": 25}, r"model\.future: 25 \(expected 2 to 24, the context\)"),
        ({"pseudo": 0}, r"model\.pseudo: 0 \(expected 1 or more\)"),
        ({"n_decoder_layers": 0}, r"model\.n_decoder_layers: 0 \(expected 1 or more\)"),
        ({"n_layers": 0}, r"model\.n_layers: 0 \(expected 1 or more\)"),
        ({"gamma": 0.0}, r"model\.gamma: 0.0 \(expected above 0, and at most 1\)"),
        ({"gamma": 1.1}, r"model\.gamma: 1.1"),
        ({"gamma": float("nan")}, r"model\.gamma: nan"),
        ({"losses": [partial(MultiToken, n=2)]}, r"model\.losses: multi_token .* fix: leave it out, and set model\.future"),
        ({"cross": None}, r"model\.cross: empty"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_when_building(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ftp(**changes)


def test_too_long_an_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: 25 a sequence \(context 24\); fix"):
        ftp()(torch.zeros(1, 25, dtype=torch.int64))


# ---------------------------------------------------------------------- its size


def parameters(v: int, d: int, h: int, g: int, f: int, n: int, p: int, encoder: int, decoder: int) -> int:
    """V D + (L_e + L_d) · block + L_d · (cross-attention + norm) + P D² + N D + two norms."""
    k = d // h
    layer = d * (h + 2 * g) * k + h * k * d + 3 * d * f + 2 * d + 2 * k
    crossing = 4 * d * d + d + 2 * k
    return v * d + (encoder + decoder) * layer + decoder * crossing + p * d * d + n * d + 2 * d


def flops(v: int, d: int, h: int, g: int, f: int, n: int, p: int, encoder: int, decoder: int, t: int) -> int:
    """Forward, a token: encoder, W, N slots through the decoder's blocks, cross-attention to P vectors, the head N times."""
    k = d // h
    layer = 2 * (d * (h + 2 * g) * k + h * k * d + 3 * d * f)
    crossing = n * 2 * 2 * d * d + p * 2 * 2 * d * d + n * p * 2 * 2 * d
    run = n * (layer + n * 2 * d) + crossing
    return encoder * (layer + t * 2 * d) + 2 * p * d * d + decoder * run + n * 2 * v * d


def test_parameters_and_flops_are_the_closed_formulas() -> None:
    model = ftp()
    assert count(model.parameters()) == parameters(V, D, H, G, FF, N, P, ENCODER, DECODER)
    for length in (T, 9):
        found = count_flops(model, length, 2)
        forward = flops(V, D, H, G, FF, N, P, ENCODER, DECODER, length)
        assert found.uncounted == {}
        assert (found.forward_per_token, found.backward_per_token) == (forward, 2 * forward)
    assert model.flops_per_token() == 3 * flops(V, D, H, G, FF, N, P, ENCODER, DECODER, T)


def test_the_predicted_time_knows_the_logits_of_every_slot() -> None:
    memory = step_memory(ftp, T, "bf16-mixed", compiled=False)
    assert work_of(memory, 2, 96, 1, 1000, 100).logits_per_token == N * V


def test_the_shipped_configuration() -> None:
    cli = built("blagpt.yaml", "--config", str(MODELS["ftp"]))
    model, size = cli.model, (50304, 768, 12, 12, 2304, 8, 12, 6, 6)
    assert count(model.parameters()) == parameters(*size) == 151_912_704
    assert model.flops_per_token() == 3 * flops(*size, 1024) == 5_265_948_672
    assert model.head.weight is model.embedding.weight
    assert (model.future, model.pseudo, model.weights[1], model.context) == (8, 12, 0.8, 1024)
    assert cli.datamodule.device_batch_size == 8


def test_a_copy_is_a_model_of_its_own() -> None:
    model = shake(ftp())
    other = copy.deepcopy(model)
    tokens, _ = batch(model)
    assert torch.equal(other.eval()(tokens), model.eval()(tokens))
    assert other.head.weight is other.embedding.weight is not model.embedding.weight
