"""What a device can do at most: dense bf16 matrix products, as its vendor states it, in FLOP a second.

The model's side (`LanguageModel.flops_per_token`) counts a multiply-add as two, forward and backward, causal attention.
"""

import torch

PEAK_BF16_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165.2e12}


def peak_flops(device: torch.device) -> float | None:
    """The vendor's dense bf16 peak of a device, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BF16_FLOPS.items() if known in name), None)
