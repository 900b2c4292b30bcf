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


class Given:
    """A TensorSource of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.tensors[name] if rows is None else self.tensors[name][rows]
