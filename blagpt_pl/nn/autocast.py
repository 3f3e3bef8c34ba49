"""Where autocast must not reach: sums that a part makes in float32 itself, and every backward pass.

Why   a backward pass under autocast rounds matrix products that the forward pass made in float32, and torch advises against
      it; ours run in the middle of training steps, where Lightning's autocast is on
"""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes matrix products in, here and now; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast off, on a device that has it."""
    has_autocast = torch.amp.is_autocast_available(device.type)  # meta has none
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
