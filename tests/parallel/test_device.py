"""What is known of the device: its peak, its memory, and what a profiler can record of it."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity

from megatron_atum.parallel import device
from megatron_atum.parallel.device import memory_gib, peak_flops, profiler_activities


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 990),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_device(name: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.bfloat16) == (tflops and tflops * 1e12)
    assert peak_flops(torch.float32) is None


def test_a_cpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    assert peak_flops(torch.bfloat16) is None
    assert profiler_activities() == [ProfilerActivity.CPU]


def test_memory_of_a_process_grows_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    before = memory_gib()
    block = torch.ones(int((before + 0.25) * 2**30) // 4)  # surely above what was there at once
    assert block.numel() and before + 0.2 < memory_gib() < 3 * before + 1


@pytest.mark.gpu
def test_memory_of_a_device() -> None:
    block = torch.ones(2**28, device="cuda")
    assert block.numel() and 1.0 <= memory_gib() < 200
    assert ProfilerActivity.CUDA in profiler_activities()
