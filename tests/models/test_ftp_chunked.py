"""Chunked FTP is a loop over chunks, each with the states of the one before; the original's leak would be noticed."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import V, adamw, attention, batch, block, check_variant, qk_norm, shake
from shipped import MODELS, built
from torch import Tensor
from torch.nn import functional as F

from blagpt_pl.losses.multi_token import MultiToken
from blagpt_pl.losses.next_token import IGNORE
from blagpt_pl.losses.z_loss import ZLoss
from blagpt_pl.models.ftp_chunked import ChunkedFTP
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.base import Carry, count
from blagpt_pl.nn.block import Branch
from blagpt_pl.nn.cross_block import CrossBlock
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.flops import count_flops
from blagpt_pl.nn.head import LinearHead, TiedHead
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.init_from import FromCheckpoint
from blagpt_pl.nn.norm import LayerNorm, RMSNorm
from blagpt_pl.nn.roles import splits_of
from blagpt_pl.nn.stack import through
from blagpt_pl.optim.schedule import Constant
from blagpt_pl.testing import check_model

D, H, G, FF = 16, 2, 1, 32  # width of the stream, heads, groups, hidden width
N, T = 4, 24  # tokens of a chunk, context
ENCODER, DECODER = 2, 1
small_block = partial(block, attention=attention(n_heads=H, n_kv_heads=G))


def chunked(**changes: object) -> ChunkedFTP:
    """Small; any argument can be changed."""
    arguments = {
        "vocab_size": V, "context": T, "d_model": D, "n_layers": ENCODER, "n_decoder_layers": DECODER, "chunk": N,
        "block": small_block(), "cross": partial(CrossAttention, n_heads=H, qk_norm=RMSNorm), "norm": RMSNorm,
        "head": TiedHead, "init": GPT2Init(zero_outputs=True), "optimizer": adamw, "schedule": Constant,
    }  # fmt: skip
    return ChunkedFTP(**{**arguments, **changes})


def exact(**changes: object) -> ChunkedFTP:
    """In float64, off its start."""
    return shake(chunked(**changes), 0.2).double().eval()


# ---------------------------------------------------------------------- the loop


def read(branch: Branch, x: Tensor, context: Tensor) -> Tensor:
    """Cross-attention from its definition: every score, no kernel."""
    part = branch.part.cross
    q = part.q_norm((branch.norm(x) @ part.q.weight.T).unflatten(-1, (part.heads.n, -1)))  # (B, n, H, K)
    k, v = ((context @ w.T).unflatten(-1, (part.heads.n, -1)) for w in part.kv.weight.chunk(2))
    scores = torch.einsum("bnhk,bphk->bhnp", q, part.k_norm(k)) / q.shape[-1] ** 0.5
    return x + torch.einsum("bhnp,bphk->bnhk", scores.softmax(-1), v).flatten(2) @ part.out.weight.T


def states(model: ChunkedFTP, past: Tensor) -> Tensor:
    """(B, t) -> (B, t, D): the encoder's, of these tokens and nothing after them."""
    x = model.embedding.weight[past]
    if model.positions is not None:
        x = x + model.positions.table.weight[: past.shape[1]]
    return model.encoder_norm(through(model.encoder, x, Carry(past, x)))


def loop(model: ChunkedFTP, tokens: Tensor) -> Tensor:
    """Logits (B, T, V), one chunk after the other; the last one as long as it is."""
    found, n = [], model.chunk
    for start in range(0, tokens.shape[1], n):
        own = tokens[:, start : start + n]
        if start:
            context = states(model, tokens[:, :start])[:, -n:]
        else:
            context = states(model, tokens[:, :1]).repeat(1, n, 1)
        mean = sum(context[:, i] for i in range(n)) / n
        rows = [model.spread_norm(mean @ w.T) for w in model.spread.weight.chunk(n)]
        x = [model.embedding.weight[own[:, j]] + model.slots.table.weight[j] + rows[j] for j in range(own.shape[1])]
        x = torch.stack(x, 1)
        carry = Carry(own, x)
        for layer in model.decoder:
            first, *rest = layer.block.branches()
            x = read(layer.cross, first(x, carry), context)
            for branch in rest:
                x = branch(x, carry)
        x = model.norm(x)
        found.append(model.head(x if model.token_bias is None else x + model.token_bias.weight[own]))
    return torch.cat(found, 1)


VARIANTS = {
    "as it is": {},
    "own head, learned positions, token bias": {
        "head": partial(LinearHead, bias=True), "positions": LearnedPositions, "token_bias": True, "chunk": 3,
    },
    "two decoder blocks": {"n_decoder_layers": 2, "n_layers": 1, "chunk": 5},
}  # fmt: skip


@pytest.mark.parametrize("length", [1, 4, 12, 15])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_equals_a_loop_over_chunks(changes: dict, length: int) -> None:
    """Logits, loss, every gradient, at lengths that are a multiple of the chunk and that are none."""
    model = exact(**changes)
    tokens, targets = batch(model, 2, length)
    targets = targets.clone()
    targets[0, -1] = IGNORE
    expected = loop(model, tokens)
    logits = model(tokens)
    assert logits.shape == (2, length, V)
    assert (logits - expected).abs().max() < 1e-10
    total, parts = model.objective(tokens, targets)
    assert list(parts) == ["loss"]
    found = []
    for value in (total, F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)):
        model.zero_grad()
        value.backward()
        found.append([value, *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())])
    assert max((a - b).abs().max().item() for a, b in zip(*found, strict=True)) < 1e-10


# ---------------------------------------------------------------------- who knows what


def moved(model: ChunkedFTP, length: int) -> Tensor:
    """(T, T): at [s, t], how far the logits at t move with token s."""
    one = torch.randint(V, (length,))
    rows = torch.where(torch.eye(length, dtype=torch.bool), (one + 1) % V, one)
    with torch.no_grad():
        return (model(rows) - model(one[None])).abs().amax(-1)


def test_a_token_knows_the_chunks_before_its_own_and_its_own_so_far() -> None:
    reach = moved(exact(), 14)
    assert not reach.tril(-1).any()
    assert reach[torch.ones(14, 14).triu().bool()].min() > 1e-9


class ByChunks(SDPA):
    """The original's encoder: every token reads all of its own chunk."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.heads.site.context == N:  # of the decoder
            return super().forward(q, k, v)
        chunk = torch.arange(q.shape[2]) // N
        return F.scaled_dot_product_attention(q, k, v, chunk[None] <= chunk[:, None], enable_gqa=True)


def test_the_originals_first_chunk_looks_into_the_future_and_that_is_noticed() -> None:
    """Its later chunks do not: their context is of chunks that have ended."""
    leaking = {"block": block(attention=attention(n_heads=H, n_kv_heads=G, core=ByChunks))}
    reach = moved(exact(**leaking), 14).tril(-1) > 1e-9
    assert reach[1:N, 0].all()
    assert not reach[:, N:].any()
    for promise in ("causality", "gradient causality"):
        with pytest.raises(AssertionError, match="looks into the future|have a gradient by token"):
            check_model(chunked(**leaking), only=[promise])


# ---------------------------------------------------------------------- the contract


def test_promises() -> None:
    """With all that can be added; as it is shipped, and compiled, `tests/lab/test_check.py` examines it."""
    added = {"dropout": 0.1, "block": small_block(dropout=0.1, post_norm=RMSNorm), "token_bias": True}
    check_variant(chunked(d_model=32, n_layers=1, losses=[ZLoss, partial(MultiToken, n=2)], **added))


def test_z_loss_and_multi_token_read_what_the_model_gives_them() -> None:
    """The further heads are decoder blocks in the last one's place, cut and biased as that one is."""
    model = exact(losses=[partial(ZLoss, weight=0.1), partial(MultiToken, n=3)], token_bias=True, n_decoder_layers=2)
    tokens, targets = batch(model, 2, 10)
    total, parts = model.objective(tokens, targets)
    found = torch.autograd.grad(total, list(model.parameters()))
    assert list(parts) == ["loss", "z_loss", "multi_token_2", "multi_token_3"]
    own, extra = model.decoder, model.losses[1].blocks
    assert all(isinstance(layer, CrossBlock) for layer in extra)
    expected = []
    for ahead, last in enumerate([own[-1], *extra]):
        model.decoder = torch.nn.ModuleList([*own[:-1], last])
        logits = loop(model, tokens)[:, : 10 - ahead]
        expected.append(F.cross_entropy(logits.flatten(0, 1), targets[:, ahead:].flatten()))
        if not ahead:
            expected.append(0.1 * logits.logsumexp(-1).square().mean())
    model.decoder = own
    assert max(abs(a - b) for a, b in zip(parts.values(), expected, strict=True)) < 1e-10
    theirs = torch.autograd.grad(sum(expected), list(model.parameters()))
    assert max((a - b).abs().max() for a, b in zip(found, theirs, strict=True)) < 1e-10


def test_its_parts_are_told_where_they_stand() -> None:
    model = chunked()
    sites = [layer.attention.part.heads.site for layer in model.encoder]
    sites += [layer.block.attention.part.heads.site for layer in model.decoder]
    assert [(s.layer, s.n_layers, s.context) for s in sites] == [(0, 3, T), (1, 3, T), (2, 3, N)]
    assert list(model.regions()) == [*model.encoder, *model.decoder]
    assert model.encoder_norm is not model.norm
    assert splits_of(model)["spread.weight"] == (D,) * N  # an optimizer of matrices takes each slot's map alone
    tokens, _ = batch(model, 2, 10)
    x, carry = model.trunk(tokens)
    assert x.shape == carry.x0.shape == carry.memo["context"].shape == (6, N, D)
    assert carry.tokens.shape == (6, N)
    assert torch.equal(carry.memo["tokens"], tokens)


def test_a_model_that_starts_from_a_checkpoint_is_the_same_function(tmp_path: Path) -> None:
    """Its own start, a gain of 0, does not come after the file's weights."""
    donor = shake(chunked())
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "donor.ckpt")
    start = GPT2Init(zero_outputs=True)
    model = chunked(init=FromCheckpoint(str(tmp_path / "donor.ckpt"), start))
    assert all(torch.equal(a, b) for a, b in zip(donor.parameters(), model.parameters(), strict=True))
    assert not chunked(init=start).spread_norm.weight.any()


def test_it_learns() -> None:
    """A sequence that counts upwards, from one of many starts."""
    model = chunked(n_layers=1)
    tokens = (torch.arange(15) + torch.arange(8)[:, None] * 7) % V
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        total, _ = model.objective(tokens[:, :-1], tokens[:, 1:])
        total.backward()
        optimizer.step()
    assert total < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 1}, r"model\.chunk: 1 \(expected 2 or more, and less than the context of 24\)"),
        ({"chunk": 24}, r"model\.chunk: 24 \(expected 2 or more, and less"),
        ({"n_decoder_layers": 0}, r"model\.n_decoder_layers: 0 \(expected 1 or more\)"),
        ({"n_layers": 0}, r"model\.n_layers: 0 \(expected 1 or more\)"),
        ({"losses": [partial(MultiToken, n=25)]}, r"MultiToken\.n: 25 \(expected 1 to 24, the context\)"),
        ({"cross": None}, r"model\.cross: empty"),
        (
            {"norm": partial(LayerNorm, gain=False)},
            r"model\.norm: LayerNorm has no gain .* fix: a norm that learns a gain",
        ),
        ({"cross": partial(CrossAttention, n_heads=H, theta=1e4)}, r"CrossAttention\.theta: 10000.0"),
    ],
)
def test_a_mistake_is_told_when_building(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chunked(**changes)


def test_too_long_an_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"tokens: 25 a sequence \(context 24\); fix"):
        chunked()(torch.zeros(1, 25, dtype=torch.int64))


# ---------------------------------------------------------------------- its size


def parameters(v: int, d: int, h: int, g: int, f: int, n: int, encoder: int, decoder: int) -> int:
    """V D + (L_e + L_d) · block + L_d · (cross-attention + norm) + N D² + N D + three norms."""
    k = d // h
    layer = d * (h + 2 * g) * k + h * k * d + 3 * d * f + 2 * d + 2 * k
    crossing = 4 * d * d + d + 2 * k
    return v * d + (encoder + decoder) * layer + decoder * crossing + n * d * d + n * d + 3 * d


def flops(v: int, d: int, h: int, g: int, f: int, n: int, encoder: int, decoder: int, t: int) -> int:
    """Forward, a token, where the chunks fill T: each block once, W once a chunk, cross-attention to N states."""
    k = d // h
    layer = 2 * (d * (h + 2 * g) * k + h * k * d + 3 * d * f)
    crossing = 2 * 4 * d * d + n * 2 * 2 * d
    return encoder * (layer + t * 2 * d) + 2 * d * d + decoder * (layer + n * 2 * d + crossing) + 2 * v * d


def test_parameters_and_flops_are_the_closed_formulas() -> None:
    model = chunked()
    assert count(model.parameters()) == parameters(V, D, H, G, FF, N, ENCODER, DECODER)
    for length in (T, 8):
        found = count_flops(model, length, 2)
        forward = flops(V, D, H, G, FF, N, ENCODER, DECODER, length)
        assert found.uncounted == {}
        assert (found.forward_per_token, found.backward_per_token) == (forward, 2 * forward)
    assert model.flops_per_token() == 3 * flops(V, D, H, G, FF, N, ENCODER, DECODER, T)


def test_the_shipped_configuration() -> None:
    model = built("blagpt.yaml", "--config", str(MODELS["ftp_seed"])).model
    size = (50304, 768, 12, 12, 2304, 8, 6, 6)
    assert count(model.parameters()) == parameters(*size) == 149_554_176
    assert round((149_554_176 + 12 * 768**2) / 1e6, 1) == 156.6  # with the map that the original never used
    assert model.flops_per_token() == 3 * flops(*size, 1024) == 901_324_800
    assert model.head.weight is model.embedding.weight
    heads = model.encoder[0].attention.part
    assert (heads.heads.n, heads.heads.n_kv, heads.heads.dim, model.chunk) == (12, 12, 64, 8)
    assert [type(edit) for edit in heads.edits] == [qk_norm.func, RoPE]
