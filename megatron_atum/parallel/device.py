"""Which device and which communication backend this process uses."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity

from megatron_atum.config.schema import TrainingConfig

# Peak of dense bf16 matrix products in FLOP/s, by a part of the device's name; the first that matches counts. From
# NVIDIA's data sheets, halved where they give the figure with sparsity (which doubles it).
_PEAK_BF16 = {
    "GB200": 2500e12,  # GB200 NVL72: 360 PFLOPS with sparsity for 72
    "B200": 2250e12,  # HGX B200: 36 PFLOPS with sparsity for 8
    "GH200": 990e12,  # GH200 Grace Hopper Superchip: 1,979 TFLOPS with sparsity
    "H200 NVL": 835e12,  # H200: NVL 1,671 TFLOPS with sparsity
    "H200": 989e12,  # H200: SXM 1,979 TFLOPS with sparsity
    "H100 NVL": 835e12,  # H100: NVL 1,671 TFLOPS with sparsity
    "H100 PCIe": 756e12,  # H100 PCIe (product brief): 1,513 TFLOPS with sparsity
    "H100": 989e12,  # H100: SXM 1,979 TFLOPS with sparsity
    "H800": 989e12,  # an H100 SXM with slower NVLink
    "A100": 312e12,  # A100: 312 TFLOPS, SXM and PCIe
    "A800": 312e12,  # an A100 with slower NVLink
    "A10G": 70e12,  # A10G: 70 TFLOPS
    "A10": 125e12,  # A10: 125 TFLOPS
    "A30": 165e12,  # A30: 165 TFLOPS
    "A40": 149.7e12,  # A40: 149.7 TFLOPS
    "L40S": 362e12,  # L40S: 362 TFLOPS
    "L40": 181e12,  # L40: 181 TFLOPS
    "L4": 121e12,  # L4: 242 TFLOPS with sparsity
}


# What a lack of memory is called by NCCL and the driver; cuBLAS and cuDNN; torch's allocator of host memory.
_NO_MEMORY = ("out of memory", "status_alloc_failed", "can't allocate memory")


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def hide_accelerators() -> None:
    """Make this process, and those that it starts, CPU processes. Only before tensors are on an accelerator.

    The variable alone would come too late where an import has asked the driver for devices: it reads it once.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.cuda.is_available = lambda: False
    torch.cuda.device_count = lambda: 0


def device() -> torch.device:
    """The accelerator of this process (chosen by LOCAL_RANK), or the CPU."""
    if has_accelerator():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    return "nccl" if has_accelerator() else "gloo"


def training_dtype(config: TrainingConfig) -> torch.dtype:
    """`auto` is bf16 with CUDA and fp32 without."""
    if config.precision == "auto":
        return torch.bfloat16 if has_accelerator() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]


@functools.cache
def has_flash_attention() -> bool:
    """Whether torch's own flash kernels run on this process's device: from Ampere on, in builds that have them."""
    if not has_accelerator() or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device()) >= (8, 0)


def has_fp8_products() -> bool:
    """Whether this process's device multiplies 8-bit floats: from Ada and Hopper on. A CPU does, for tests."""
    return not has_accelerator() or torch.cuda.get_device_capability(device()) >= (8, 9)


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that the device can copy to without waiting."""
    return torch.empty(shape, dtype=dtype, pin_memory=has_accelerator())


def wait_for_device() -> None:
    """Wait until the device has done all that it was given."""
    if has_accelerator():
        torch.cuda.synchronize()


@contextlib.contextmanager
def beside_training() -> Iterator[None]:
    """For a thread: what it asks of the device does not queue behind the training."""
    if not has_accelerator():
        yield
        return
    torch.cuda.set_device(device())
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def peak_flops(dtype: torch.dtype) -> float | None:
    """FLOP/s that this process's device can do at most in dense matrix products; None where it is not known.

    Only for bf16 and fp16: what fp32 reaches depends on whether products may round to TF32.
    """
    if not has_accelerator() or dtype not in (torch.bfloat16, torch.float16):
        return None
    words = torch.cuda.get_device_name(device()).replace("-", " ").split()
    if "MIG" in words:  # a part of a device
        return None
    name = f" {' '.join(words)} "
    return next((peak for part, peak in _PEAK_BF16.items() if f" {part} " in name), None)


def memory_gib() -> float:
    """Most memory that tensors have taken on the device at once, since the start or `reset_peak_memory`; on a CPU,
    that the process has taken since its start."""
    if has_accelerator():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in KiB


def reset_peak_memory() -> None:
    """`memory_gib` counts from here. A process's own peak cannot be reset, so on a CPU nothing happens."""
    if has_accelerator():
        torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for what its own allocator is refused; libraries that allocate by themselves tell in words."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in said for words in _NO_MEMORY)


def profiler_activities() -> list[ProfilerActivity]:
    """What torch's profiler can record here."""
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if has_accelerator() else [ProfilerActivity.CPU]


def device_name() -> str:
    return torch.cuda.get_device_name(device()) if has_accelerator() else "CPU process"
