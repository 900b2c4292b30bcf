"""The same bits in every run of the same configuration on the same machines."""

from __future__ import annotations

import os

import torch


def be_deterministic() -> None:
    """Only before the device is first used: cuBLAS reads its setting then.

    Operations without a deterministic form raise. On a CPU everything is deterministic as it is.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # the order of a reduction must not depend on what NCCL measures
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
