"""Which device and which communication backend this process uses."""

from __future__ import annotations

import os

import torch

from megatron_atum.config.schema import TrainingConfig


def device() -> torch.device:
    """The accelerator of this process (chosen by LOCAL_RANK), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def training_dtype(config: TrainingConfig) -> torch.dtype:
    """`auto` is bf16 with CUDA and fp32 without."""
    if config.precision == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[config.precision]
