"""What is known of the device: its peak, its memory, and what a profiler can record of it."""

from __future__ import annotations

import os

import pytest
import torch
from torch.profiler import ProfilerActivity

from megatron_atum.parallel import device
from megatron_atum.parallel.device import (
    has_accelerator,
    hide_accelerators,
    is_out_of_memory,
    memory_gib,
    peak_flops,
    profiler_activities,
    reset_peak_memory,
)


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


def test_the_peak_of_a_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_accelerator", lambda: False)
    before = memory_gib()
    reset_peak_memory()
    assert memory_gib() >= before > 0.0


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("any words"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed.\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_is_a_lack_of_memory(error: RuntimeError, memory: bool) -> None:
    assert is_out_of_memory(error) is memory


def test_accelerators_are_hidden_also_after_the_driver_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    hide_accelerators()
    assert not has_accelerator() and torch.cuda.device_count() == 0
    assert device.device() == torch.device("cpu") and device.backend() == "gloo"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # for processes that are started


@pytest.mark.gpu
def test_memory_of_a_device() -> None:
    block = torch.ones(2**28, device="cuda")
    assert block.numel() and 1.0 <= memory_gib() < 200
    del block
    reset_peak_memory()
    assert memory_gib() < 1.0
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**45, device="cuda")
    assert is_out_of_memory(told.value)
    assert ProfilerActivity.CUDA in profiler_activities()
