"""Devices are found by name, however it is written, and never taken for another."""

from types import SimpleNamespace

import pytest
import torch

from blagpt_pl.devices import DEVICES, device_named, device_of, peak_flops
from blagpt_pl.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("H200", "H200"), ("h200", "H200"), ("NVIDIA H100", "H100"), ("a100-80gb", "A100-80GB"), ("A100 40GB", "A100-40GB"),
        ("l40s", "L40S"), ("rtx4090", "RTX 4090"), ("GeForce RTX 4090", "RTX 4090"), ("b200", "B200"),
    ],
)  # fmt: skip
def test_a_name_may_be_written_in_many_ways(written: str, name: str) -> None:
    assert device_named(written).name == name


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("H20O", "fix: H200"),
        ("a100", "fix: A100-80GB or A100-40GB"),
        ("", "expected"),
        ("toaster", "expected"),
        ("-", "expected"),
    ],
)
def test_an_unknown_or_ambiguous_name_is_refused(written: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        device_named(written)
    assert nearest in str(caught.value)
    assert all(d.name in str(caught.value) for d in DEVICES)


@pytest.mark.parametrize(
    ("cuda_name", "memory", "name"),
    [
        ("NVIDIA H200", 150e9, "H200"),
        ("NVIDIA H100 80GB HBM3", 85e9, "H100"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "A100-40GB"),
        ("NVIDIA L40S", 48e9, "L40S"),
        ("NVIDIA GeForce RTX 4090", 25e9, "RTX 4090"),
        ("NVIDIA B200", 192e9, "B200"),
        ("NVIDIA H100 PCIe", 85e9, None),  # slower than what is in the table
        ("NVIDIA H200 NVL", 150e9, None),
        ("NVIDIA GH200 480GB", 102e9, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 17e9, None),
        ("NVIDIA T4", 16e9, None),
    ],
)
def test_a_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, cuda_name: str, memory: float, name: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cuda_name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=int(memory)))
    found = device_of(torch.device("cuda"))
    assert (found and found.name) == name
    assert peak_flops(torch.device("cuda")) == (found and found.bf16_flops)


def test_a_cpu_is_not_known() -> None:
    assert device_of(torch.device("cpu")) is None
    assert peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_units(device: object) -> None:
    assert 1e14 < device.bf16_flops < 1e16
    assert 5e11 < device.bandwidth_bytes_per_s < 1e13
    assert 20e9 < device.memory_bytes < 300e9
    assert device_named(device.name) is device


def test_what_the_data_sheets_say() -> None:
    found = {d.name: (d.bf16_flops / 1e12, d.bandwidth_bytes_per_s / 1e12, d.memory_bytes // 10**9) for d in DEVICES}
    assert found == {
        "B200": (2250, 8.0, 180),
        "H200": (989.4, 4.8, 141),
        "H100": (989.4, 3.35, 80),
        "A100-80GB": (312, 2.039, 80),
        "A100-40GB": (312, 1.555, 40),
        "L40S": (362, 0.864, 48),
        "RTX 4090": (165.2, 1.008, 24),
    }
