"""Shared blocks and the maps that a use adds: low-rank, its own, copies; scores as of heads half as wide."""

from functools import partial

import pytest
import torch
from helpers import SITE, D, carry_of, shake
from torch import Tensor

from blagpt_pl.nn.activation import GELU
from blagpt_pl.nn.adapters import Adapters, low_rank
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.edit_qk_norm import QKNorm
from blagpt_pl.nn.attention.shared import SharedAttention
from blagpt_pl.nn.base import Carry
from blagpt_pl.nn.norm import RMSNorm
from blagpt_pl.nn.shared_block import SHARED, SharedBlock, TakingUp

attention = partial(SharedAttention, n_heads=4, norm=RMSNorm, core=SDPA)


def a_use(adapted: bool = False) -> tuple[SharedBlock, Adapters, Tensor, Carry]:
    """A block, the maps of a use, a stream and what travels beside it."""
    torch.manual_seed(0)
    block = SharedBlock(SITE, partial(attention, adapted=adapted), RMSNorm, GELU, ratio=2)
    maps = Adapters(block.maps(), 5)
    x, x0 = torch.randn(2, 2, 13, D)
    return shake(block, 0.1), shake(maps, 0.1), x, Carry(carry_of(x).tokens, x0)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_map_that_is_added_is_the_map_that_is_merged(adapted: bool) -> None:
    block, use, x, carry = (a.double() if hasattr(a, "double") else a for a in a_use(adapted))
    carry = carry.but(carry.x0.double())
    y = block(x, carry.but(memo=use(x, carry)))
    with torch.no_grad():
        rows = dict(zip("qkv", block.attention.qkv.weight.chunk(3), strict=True)) | {"gate_up": block.gate_up.weight}
        for name, down in use.down.items():
            rows[name].add_(use.up[name].weight @ down.weight)
            use.up[name].weight.zero_()
    assert {*use.down} == ({"q", "k", "v", "gate_up"} if adapted else {"gate_up"})
    assert (block(x, carry.but(memo=use(x, carry))) - y).abs().max() < 1e-12


def test_what_is_handed_over_are_copies_through_which_gradients_flow() -> None:
    _, use, x, carry = a_use()
    maps = use(x, carry)
    for end, module in (("down", use.down), ("up", use.up)):
        assert torch.equal(maps[f"gate_up.{end}"], module["gate_up"].weight)
        assert maps[f"gate_up.{end}"].data_ptr() != module["gate_up"].weight.data_ptr()
    low_rank(x, "gate_up", maps).square().sum().backward()
    found = [use.down["gate_up"].weight.grad, use.up["gate_up"].weight.grad]
    use.zero_grad()
    use.up["gate_up"](use.down["gate_up"](x)).square().sum().backward()
    for a, b in zip(found, (use.down["gate_up"].weight.grad, use.up["gate_up"].weight.grad), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_scores_are_scaled_behind_a_norm_of_queries() -> None:
    """Before it, the norm would undo it."""
    seen = []

    class Seen(SDPA):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.append((q, k))
            return super().forward(q, k, v)

    part = attention(SITE, core=Seen, edits=[partial(QKNorm, norm=RMSNorm)])
    x = torch.randn(2, 9, D)
    part(x, carry_of(x))
    (q, k), width = seen[0], 2 * D // 4
    assert q.shape == (2, 4, 9, width)
    assert (q.square().mean(-1) - 2).abs().max() < 1e-3 and (k.square().mean(-1) - 1).abs().max() < 1e-3


def test_a_layer_takes_up_what_was_said_and_keeps_its_own_residual() -> None:
    _, _, x, carry = a_use()
    layer = TakingUp(SITE, RMSNorm, partial(attention))
    said = torch.randn_like(x)
    y = layer(x, carry.but(memo={SHARED: said}))
    assert torch.equal(y, x + layer.mixer(layer.norm(x + said @ layer.enter.weight.T), carry))
    layer.mixer.out.weight.data.zero_()
    assert torch.equal(layer(x, carry.but(memo={SHARED: said})), x)


@pytest.mark.parametrize("adapted", [False, True])
def test_under_autocast_it_is_close_and_of_its_dtype(adapted: bool) -> None:
    block, use, x, carry = a_use(adapted)
    y = block(x, carry.but(memo=use(x, carry)))
    with torch.autocast("cpu", torch.bfloat16):
        z = block(x, carry.but(memo=use(x, carry)))
    assert z.isfinite().all()
    assert (z - y).abs().max() < 0.03 * y.abs().max()
    z.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (*block.parameters(), *use.parameters()))
