"""Attention that torch's fused kernels cannot express: scores changed by a formula, pairs left out by a rule.

Source   Dong et al. 2024, "FlexAttention", arXiv:2412.05496
Formula  y_t = Σ_{s: pair(t, s)} softmax_s(change(q_t · k_s / sqrt(K))) v_s; the scores are changed where they are made
How      `fused` makes torch's flex_attention a kernel with both functions in it; `scored` is the naive form, with the scores in
         memory. `fused_or` decides: the kernel on CUDA, within the block's own graph where the block is compiled; the twin on
         other devices, in float64, for heads narrower than 16, and where torch was told to stay eager (as generation tells it)
Blocks   which blocks of 128 x 128 pairs hold something is found once for each rule, length and device, when it is traced; a
         compiled graph has them as constants, and makes no mask in a forward pass
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from blagpt_pl.nn.autocast import without_autocast
from blagpt_pl.nn.base import wide
from blagpt_pl.nn.compiled import APART
from blagpt_pl.nn.softcap import soft_cap

NARROWEST = 16  # head width that flex_attention's kernels begin at
BLOCKS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip

Pair = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, t, s -> whether query t reads key s
Value = int | tuple[int, ...] | None  # what a rule is told
Change = Callable[[Tensor], Tensor]  # a score -> what it becomes


def band(window: int | None) -> Pair:
    """Each query reads itself and the keys before it; the last `window` of these, itself included, where there is one."""

    def past(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return t >= s

    def near(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & (t - s < window)

    return past if window is None else near


@cache
def found(rule: Callable[..., Pair], value: Value, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """The tensors of the rule's block mask; neither of inference mode nor of a graph, for whoever comes next."""
    with torch.inference_mode(False), torch.no_grad():
        mask = create_block_mask(rule(value), None, None, length, length, device=device)
    return tuple(getattr(mask, name) for name in BLOCKS)


@torch.compiler.assume_constant_result
def blocks(rule: Callable[..., Pair], value: Value, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """`found`, a constant in compiled code."""
    return found(rule, value, length, device)


def fused(q: Tensor, k: Tensor, v: Tensor, rule: Callable[..., Pair], value: Value, cap: float | None) -> Tensor:
    """Through flex_attention, a kernel once it is compiled: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K').

    Args:
        q, k, v: the heads.
        rule: a function of the module's level, and of `value`: which pairs there are.
        value: what the rule is told.
        cap: c of a soft cap of the scores.
    """

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return soft_cap(score, cap)

    length = q.shape[2]
    tensors = blocks(rule, value, length, q.device)
    mask = BlockMask((length, length), **dict(zip(BLOCKS, tensors, strict=True)), mask_mod=rule(value))
    change = None if cap is None else capped
    k, same = k.to(q.dtype), v.to(q.dtype)  # under autocast an edit's float32 gain may have widened one of them
    return flex_attention(q, k, same, change, mask, enable_gqa=q.shape[1] != k.shape[1]).to(v.dtype)


def scored(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, change: Change) -> Tensor:
    """The naive form: q (B, H, T, K), k (B, G, S, K), v (B, G, S, K') -> (B, H, T, K'); scores (B, H, T, S) in memory.

    Args:
        q, k, v: the heads.
        pairs: (T, S), whether query t reads key s.
        change: of the scores, elementwise; in float32.
    """
    n, length = q.shape[1:3]
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H / G · T, K): k is never repeated
    with without_autocast(q.device):  # it would round the scores
        scores = (wide(grouped) @ wide(k).mT).unflatten(2, (-1, length)) * q.shape[-1] ** -0.5  # (B, G, H / G, T, S)
    p = change(scores).masked_fill(~pairs, -torch.inf).softmax(-1).to(v.dtype)
    return (p.flatten(2, 3) @ v).reshape(len(q), n, length, -1)  # (B, H, T, K')


def has_kernel(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether flex_attention has a kernel there, for heads of these widths."""
    return device.type == "cuda" and dtype != torch.float64 and min(widths) >= NARROWEST


@cache
def compiled(form: Callable, twin: Callable) -> Callable:
    """For a block that is not compiled; made on first use, for torch.compile alone imports for seconds."""

    def either(*given: object) -> Tensor:  # eager where torch was told to stay so
        return form(*given) if torch.compiler.is_compiling() else twin(*given)

    return torch.compile(either, dynamic=False, **APART)


def fused_or(form: Callable, twin: Callable, q: Tensor, k: Tensor, v: Tensor, *values: float | None) -> Tensor:
    """`form(q, k, v, *values)` where there is a kernel, else its twin of the same arguments."""
    if not has_kernel(q.device, q.dtype, q.shape[-1], v.shape[-1]):
        return twin(q, k, v, *values)
    if torch.compiler.is_compiling():  # the block is: one graph
        return form(q, k, v, *values)
    return compiled(form, twin)(q, k, v, *values)
