"""Which of torch's kernels attends: the order in which they are tried, and which one it comes to.

Why   torch tries FlashAttention-2 first and cuDNN last. On Hopper (compute capability 9.0) cuDNN's kernel is the faster one
      for training; elsewhere it is not, and torch's own order stays (transformers PR 48163: 1.7 to 2.3 times on Hopper,
      slower on A100 and Blackwell; a claim of its source, not measured here)
How   `sdpa_kernel` around the call, with all four kernels in it, so that what cuDNN refuses (float32, odd widths, deterministic
      algorithms) goes to the next that takes it. torch's flags are as before afterwards. Compiled code has chosen when it
      was traced, and holds nothing but the kernel. Whoever has turned a kernel off has chosen already: nothing is reordered
K/V   FlashAttention, cuDNN and torch's CPU kernel read grouped heads as they are. torch's math repeats them, and runs where
      none of these can: float32 on CUDA with grouped heads, and on CPU dropout and values of another width than the keys
"""

from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from blagpt_pl.nn.base import Core

HOPPER = (9, 0)
MOST = (
    65535  # sequences of one call: the kernels on CUDA have them on a grid axis that ends there (pytorch issue 146704)
)
ON_HOPPER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.FLASH_ATTENTION: "flash",
    SDPBackend.EFFICIENT_ATTENTION: "efficient",
    SDPBackend.MATH: "math",
    SDPBackend.OVERRIDEABLE: "the device's own",
    SDPBackend.ERROR: "none",
}


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Major and minor compute capability of a CUDA device; (0, 0) where there is none (tensors without memory)."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


@torch.compiler.assume_constant_result
def reordered(device: torch.device) -> bool:
    """Whether `ON_HOPPER` is the order there; asked once in compiled code, while it is traced."""
    if device.type != "cuda" or capability(device) != HOPPER:
        return False
    flags = (cuda.cudnn_sdp_enabled, cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    return all(enabled() for enabled in flags)


def causal(q: Tensor, k: Tensor, v: Tensor, dropout: float, grouped: bool) -> Tensor:
    """Causal attention by the first kernel that can: q (B, H, T, K), k (B, G, T, K), v (B, G, T, K') -> (B, H, T, K').

    Args:
        q, k, v: the heads.
        dropout: probability of dropping an attention weight, now.
        grouped: whether query heads share keys, G < H.
    """
    return attend(q, k, v, dropout, grouped, is_causal=True)


def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, grouped: bool, is_causal: bool) -> Tensor:
    """The same, or of all pairs: q (B, H, T, K), k (B, G, S, K), v (B, G, S, K') -> (B, H, T, K')."""
    if len(q) > MOST:
        pieces = [(t.split(MOST)) for t in (q, k, v)]
        return torch.cat([attend(*piece, dropout, grouped, is_causal) for piece in zip(*pieces, strict=True)])
    if reordered(q.device):
        with sdpa_kernel(ON_HOPPER, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal, enable_gqa=grouped)


def backend_used(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> str:
    """The kernel that `causal` comes to, by torch's own choice: "cuDNN", "flash", "efficient", "math", on CPU "flash (CPU)"."""
    asked = {"dropout_p": dropout, "is_causal": True, "enable_gqa": q.shape[1] != k.shape[1]}
    if reordered(q.device):
        with sdpa_kernel(ON_HOPPER, set_priority=True):
            chosen = torch._fused_sdp_choice(q, k, v, **asked)
    else:
        chosen = torch._fused_sdp_choice(q, k, v, **asked)
    name = NAMES[SDPBackend(chosen)]
    return f"{name} (CPU)" if (q.device.type, name) == ("cpu", "flash") else name


def kernels(model: nn.Module, kind: type, device: torch.device, dtype: torch.dtype, tokens: int) -> str:
    """What the parts of one kind run by, in words: "cuDNN", or "flash x 11, flex x 1"; "" where a model has none.

    Args:
        model: with any number of them.
        kind: `Core`: a core that says nothing (`kernel(device, dtype, tokens)`) is called by its name; or `SequenceMixer`: of
            these those count that say something, which are recurrences.
        device: where it will run; a kernel is asked with one short-lived sequence there.
        dtype: of the heads: autocast's, where that is on.
        tokens: T of a training sequence.
    """
    found: Counter[str] = Counter()
    for part in (m for m in model.modules() if isinstance(m, kind)):
        say = getattr(part, "kernel", None)
        if say is not None or kind is Core:
            found[type(part).__name__ if say is None else say(device, dtype, tokens)] += 1
    return ", ".join(found) if len(found) < 2 else ", ".join(f"{name} x {n}" for name, n in found.items())
