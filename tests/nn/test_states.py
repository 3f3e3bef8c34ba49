"""A sequence in pieces: what parts remember, that it is enough and no more, and who says that it is."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from helpers import attention, qk_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from blagpt_pl.nn.attention.attention import Attention
from blagpt_pl.nn.attention.core_dilated import Dilated
from blagpt_pl.nn.attention.core_meta import MetaWindowed
from blagpt_pl.nn.attention.core_sdpa import SDPA
from blagpt_pl.nn.attention.core_softcap import SoftCapped
from blagpt_pl.nn.attention.core_window import Windowed
from blagpt_pl.nn.attention.edit_kv_shift import KVShift
from blagpt_pl.nn.attention.edit_rope import RoPE
from blagpt_pl.nn.attention.latent import LatentAttention
from blagpt_pl.nn.attention.later import last
from blagpt_pl.nn.attention.pattention import PattentionAttention
from blagpt_pl.nn.base import Carry, ChannelMixer, Site, continues
from blagpt_pl.nn.embed import LearnedPositions
from blagpt_pl.nn.states import States

SITE = Site(d_model=32, n_layers=2, layer=0, vocab_size=61, context=32)
ATTENTIONS = {
    "plain": attention(edits=None),
    "rotated, shifted, grouped": attention(edits=[KVShift, qk_norm, RoPE]),
    "windowed": attention(edits=[KVShift, RoPE], core=partial(Windowed, window=5)),
    "windowed, soft-capped": attention(edits=[RoPE], core=partial(Windowed, window=4, cap=2.0)),
    "windowed, beside the first": attention(edits=[RoPE], core=partial(MetaWindowed, window=4, always=3)),
    "soft-capped": attention(edits=[RoPE], core=partial(SoftCapped, cap=2.0)),
    "of tokens": partial(PattentionAttention, n_heads=4, n_tokens=40, n_kv_heads=2, core=SDPA, edits=[RoPE]),
}


def in_pieces(part: nn.Module, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[States]]:
    """A part's output over x (B, T, D), piece by piece, and the states of each piece."""
    states, outputs, seen = States(), [], []
    for piece in x.split(list(sizes), dim=1):
        outputs.append(part(piece, Carry(torch.zeros(piece.shape[:2], dtype=torch.int64), piece, states=states)))
        seen.append(states)
        states = states.after(piece.shape[1])
    return torch.cat(outputs, dim=1), [*seen, states]


@pytest.mark.parametrize("part", ATTENTIONS.values(), ids=ATTENTIONS)
@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_attention_over_pieces_is_attention_over_the_whole(part: partial, sizes: list[int]) -> None:
    torch.manual_seed(len(sizes))
    mixer = part(SITE).double().eval()
    x = torch.randn(2, sum(sizes), 32, dtype=torch.float64)
    pieces, seen = in_pieces(mixer, x, sizes)
    whole = mixer(x, Carry(torch.zeros(x.shape[:2], dtype=torch.int64), x))
    assert (pieces - whole).abs().max() < 1e-12
    assert seen[-1].start == sum(sizes)
    assert seen[-1].grows == (not isinstance(mixer.core, Windowed | MetaWindowed))


def test_a_window_remembers_no_more_than_it_reads() -> None:
    mixer = attention(edits=None, core=partial(Windowed, window=5))(SITE)
    _, seen = in_pieces(mixer, torch.randn(1, 12, 32), [3, 6, 1, 1, 1])
    assert [states.after(0).take()[0].shape[2] for states in seen[:-1]] == [3, 4, 4, 4, 4]


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_last_queries_read_what_stands_before_them(window: int | None) -> None:
    q, k, v = (torch.randn(2, n, t, 4, dtype=torch.float64) for n, t in ((4, 3), (2, 11), (2, 11)))
    y = last(q, k, v, window)
    for i in range(3):
        stop = 11 - 3 + i + 1
        first = 0 if window is None else max(0, stop - window)
        for h in range(4):
            p = (q[:, h, i, None] @ k[:, h // 2, first:stop].mT / 2).softmax(-1)  # sqrt(4) = 2
            assert (y[:, h, i] - (p @ v[:, h // 2, first:stop])[:, 0]).abs().max() < 1e-14


def test_states_are_taken_in_the_order_of_the_calls() -> None:
    first = States()
    assert first.take() is None
    first.leave(torch.tensor(1))
    first.leave(torch.tensor(2), torch.tensor(3), grows=True)
    then = first.after(4)
    assert (then.start, then.grows) == (4, True)
    assert then.take() == (1,)
    assert then.take() == (2, 3)
    with pytest.raises(StopIteration):
        then.take()
    assert (first.start, States().grows) == (0, False)


class Turned(RoPE):
    """Has a forward of its own, which knows nothing of pieces."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, carry: Carry) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(k, q, v, carry)


class Renamed(RoPE):
    """Nothing new."""


class Blind(ChannelMixer):
    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        return x


class Shifting(Blind):
    reads_before = 1


class Projected(Attention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x)


def test_who_has_another_forward_must_say_anew_that_it_continues() -> None:
    assert continues(attention(edits=[Renamed])(SITE))
    for edits, core in (([Turned], SDPA), (None, partial(Dilated, segments=[4, 8], dilations=[1, 2]))):
        assert not continues(attention(edits=edits, core=core)(SITE))
    assert not continues(Projected(SITE, 4, SDPA))
    latent = partial(LatentAttention, n_heads=4, kv_rank=12, nope_dim=6, rope_dim=4, v_dim=8, norm=nn.RMSNorm)
    assert not continues(latent(SITE, core=SDPA))
    assert not continues(LearnedPositions(SITE))
    assert continues(Blind()) and not continues(Shifting())


def test_one_that_grows_is_enough() -> None:
    states = States()
    states.leave(torch.tensor(1), grows=True)
    states.leave(torch.tensor(2))
    assert states.grows and states.after(1).grows
