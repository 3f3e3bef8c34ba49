"""What a device can do at most, as its vendor states it: dense bf16 matrix products, memory traffic, memory.

The model's side (`LanguageModel.flops_per_token`) counts a multiply-add as two, forward and backward, causal attention.
Read from the vendor's data sheets; a card's usable memory differs from the stated by some per cent, by kind and driver.
"""

import difflib
import re
from dataclasses import dataclass

import torch

from blagpt_pl.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        name: as it is written, and as a part of what CUDA calls it.
        bf16_flops: dense bf16 matrix products with float32 sums, FLOP a second.
        bandwidth_bytes_per_s: of its memory.
        memory_bytes: stated capacity, a GB being 10^9 bytes.
    """

    name: str
    bf16_flops: float
    bandwidth_bytes_per_s: float
    memory_bytes: int


GB = 10**9
DEVICES = (
    # NVIDIA HGX B200 data sheet (bf16: 4.5 PFLOPS with sparsity, half of it dense), DGX B200 for the memory of one GPU
    Device("B200", 2250e12, 8.0e12, 180 * GB),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM (bf16: 1,979 TFLOPS with sparsity, half of it dense)
    Device("H200", 989.4e12, 4.8e12, 141 * GB),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5 80 GB
    Device("H100", 989.4e12, 3.35e12, 80 * GB),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM4: 80 GB HBM2e and 40 GB HBM2
    Device("A100-80GB", 312e12, 2.039e12, 80 * GB),
    Device("A100-40GB", 312e12, 1.555e12, 40 * GB),
    # NVIDIA L40S data sheet (bf16: 733 TFLOPS with sparsity, 362.05 dense)
    Device("L40S", 362e12, 0.864e12, 48 * GB),
    # NVIDIA Ada GPU architecture whitepaper, GeForce RTX 4090 (bf16 with float32 sums)
    Device("RTX 4090", 165.2e12, 1.008e12, 24 * GB),
)
OTHERS = re.compile(
    r"H[12]00 (PCIe|NVL)|G[HB]200|RTX 4090 (D|Laptop)", re.IGNORECASE
)  # other chips under a name that begins alike


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower()).removeprefix("nvidia").removeprefix("geforce")


def device_named(name: str, field: str = "device") -> Device:
    """The device a user means; case, spaces, dashes and the vendor's name do not matter, a part of the name will do.

    Args:
        name: as the user writes it.
        field: where it was written, for the error.

    Raises:
        ConfigError: it is not known, or could be several.
    """
    found = [d for d in DEVICES if _plain(d.name) == _plain(name)]
    found = found or [d for d in DEVICES if _plain(name) and _plain(name) in _plain(d.name)]
    if len(found) == 1:
        return found[0]
    by_name = {_plain(d.name): d.name for d in DEVICES}
    near = difflib.get_close_matches(_plain(name), by_name, n=1, cutoff=0.5)
    known = ", ".join(d.name for d in DEVICES)
    hint = " or ".join(d.name for d in found) or (by_name[near[0]] if near else "")
    raise ConfigError(f"{field}: {name!r} (expected one of {known}){f'; fix: {hint}' if hint else ''}")


def device_of(device: torch.device) -> Device | None:
    """What is known of a device that is there, or None."""
    if device.type != "cuda":
        return None
    cuda_name = torch.cuda.get_device_name(device)
    if OTHERS.search(cuda_name):
        return None
    name = _plain(cuda_name)
    found = [d for d in DEVICES if _plain(d.name).removesuffix("80gb").removesuffix("40gb") in name]
    if len(found) > 1:  # one chip with two sizes of memory
        size = torch.cuda.get_device_properties(device).total_memory
        found = sorted(found, key=lambda d: abs(d.memory_bytes - size))
    return found[0] if found else None


def peak_flops(device: torch.device) -> float | None:
    """The vendor's dense bf16 peak of a device, or None where it is not known."""
    known = device_of(device)
    return None if known is None else known.bf16_flops
