"""What weights come from: a Hugging Face folder, a LLaMA and a CLIP, a checkpoint of this project, a seed."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TensorSource(Protocol):
    """Tensors of an ATUM by Hugging Face name, read when asked for."""

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows (of its first dimension), on the CPU.

        Raises:
            CheckpointError: it cannot be read, or holds NaN or infinite values.
        """
        ...
