"""Which device and which communication backend this process uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_atum.config.schema import TrainingConfig


def has_accelerator() -> bool:
    return torch.cuda.is_available()


def hide_accelerators() -> None:
    """Make this process a CPU process. Only before anything has asked for an accelerator."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


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
