"""A block with a branch that reads another stream: its formula, where it stands, and what it refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import SITE, D, block, carry_of, shake
from torch import Tensor, nn

from blagpt_pl.nn.activation import SiLU
from blagpt_pl.nn.attention.cross import CrossAttention
from blagpt_pl.nn.base import Carry, Site, count
from blagpt_pl.nn.block import Block, Branch
from blagpt_pl.nn.cross_block import CONTEXT, CrossBlock
from blagpt_pl.nn.init import GPT2Init
from blagpt_pl.nn.memory import RecomputeBlocks
from blagpt_pl.nn.mlp import GatedMLP
from blagpt_pl.nn.norm import LayerNorm, RMSNorm

H, S, T = 4, 5, 7
cross = partial(CrossAttention, n_heads=H)


def crossed(**changes: object) -> CrossBlock:
    return shake(CrossBlock(SITE, block(**changes), partial(cross, qk_norm=RMSNorm), RMSNorm), 0.2)


def streams(dtype: torch.dtype = torch.float64, length: int = T) -> tuple[Tensor, Carry]:
    """A stream, and what travels beside it: another stream among that."""
    x = torch.randn(2, length, D, dtype=dtype, requires_grad=True)
    carry = carry_of(x)
    carry.memo[CONTEXT] = torch.randn(2, S, D, dtype=dtype, requires_grad=True)
    return x, carry


def read(branch: Branch, x: Tensor, context: Tensor) -> Tensor:
    """One position, one head after the other."""
    part = branch.part.cross
    q = part.q_norm((branch.norm(x) @ part.q.weight.T).unflatten(-1, (H, -1)))
    k, v = ((context @ w.T).unflatten(-1, (H, -1)) for w in part.kv.weight.chunk(2))
    k, rows = part.k_norm(k), []
    for t in range(x.shape[1]):
        heads = []
        for h in range(H):
            p = ((k[:, :, h] * q[:, t, None, h]).sum(-1) / k.shape[-1] ** 0.5).softmax(-1)  # (B, S)
            heads.append((p[..., None] * v[:, :, h]).sum(1))
        rows.append(torch.cat(heads, -1) @ part.out.weight.T)
    return x + torch.stack(rows, 1)


@pytest.mark.parametrize("changes", [{}, {"post_norm": LayerNorm}])
def test_it_is_its_formula(changes: dict) -> None:
    layer = crossed(**changes).double()
    x, carry = streams()
    expected = read(layer.cross, layer.block.attention(x, carry), carry.memo[CONTEXT])
    expected = layer.block.mlp(expected, carry)
    by = [x, carry.memo[CONTEXT], *layer.parameters()]
    weight = torch.randn_like(x)
    pairs = [[y, *torch.autograd.grad((y * weight).sum(), by)] for y in (layer(x, carry), expected)]
    assert max((a - b).abs().max().item() for a, b in zip(*pairs, strict=True)) < 1e-10
    assert all(g.any() for g in pairs[0])


def test_every_position_reads_all_of_the_other_stream_and_none_of_its_own_future() -> None:
    layer = crossed().double()
    x, carry = streams()
    y = layer(x, carry)
    for t in range(T):
        by_x, by_context = torch.autograd.grad(y[:, t].sum(), [x, carry.memo[CONTEXT]], retain_graph=True)
        assert not by_x[:, t + 1 :].any()
        assert by_context.abs().amax(-1).min() > 0


class More(Block):
    """A block with a third branch."""

    def __init__(self, site: Site, **parts: object) -> None:
        super().__init__(site, **parts)
        self.more = Branch(RMSNorm(site.d_model), GatedMLP(site, SiLU), None, nn.Identity())

    def branches(self) -> tuple[Branch, ...]:
        return *super().branches(), self.more


def test_it_stands_after_the_first_branch_and_before_all_others() -> None:
    layer = CrossBlock(replace(SITE, layer=1), partial(More, **block().keywords), cross, RMSNorm)
    seen = []
    for name in ("block.attention", "cross", "block.mlp", "block.more"):
        layer.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    layer(*streams(torch.float32))
    assert seen == ["block.attention", "cross", "block.mlp", "block.more"]
    assert layer.cross.part.cross.heads.site.layer == layer.block.attention.part.heads.site.layer == 1


def test_a_block_that_joins_in_a_way_of_its_own_is_refused() -> None:
    class Parallel(Block):
        def forward(self, x: Tensor, carry: Carry) -> Tensor:
            return self.attention(x, carry) + self.mlp(x, carry) - x

    parallel = partial(Parallel, **block().keywords)
    for other, name in ((parallel, "Parallel"), (lambda site: nn.Identity(), "Identity")):
        with pytest.raises(ValueError, match=f"layer 0: model.block: {name} joins its branches in a way of its own"):
            CrossBlock(SITE, other, cross, RMSNorm)
    with pytest.raises(ValueError, match="model.cross: empty"):
        CrossBlock(SITE, block(), None, RMSNorm)


def test_with_a_zero_start_it_is_the_identity_at_first_and_learns_what_it_reads() -> None:
    layer = CrossBlock(SITE, block(), cross, RMSNorm)
    GPT2Init(zero_outputs=True)(layer, SITE)
    x, carry = streams(torch.float32)
    y = layer(x, carry)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert layer.cross.part.cross.out.weight.grad.any()


def test_parameters_are_those_of_the_block_and_of_one_more_branch() -> None:
    layer = crossed()
    assert count(layer.parameters()) == count(layer.block.parameters()) + 4 * D * D + D + 2 * (D // H)


def test_recomputed_and_compiled_it_is_the_same() -> None:
    torch._dynamo.reset()
    plain, policy, found = crossed(), RecomputeBlocks(), []
    x, carry = streams(torch.float32)
    by = [x, carry.memo[CONTEXT], *plain.parameters()]
    for how in ("plain", "recomputed", "compiled"):
        if how == "recomputed":
            policy.on_region(plain)
        if how == "compiled":
            plain.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        y = plain(x, carry)
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), by)])
    torch._dynamo.reset()
    for other in found[1:]:
        assert max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(other, found[0], strict=True)) < 1e-5
