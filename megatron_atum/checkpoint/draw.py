"""Weights drawn from a seed. A tensor depends on the seed and its name only, so all layouts start alike."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_atum.checkpoint.source import TensorSource
from megatron_atum.checkpoint.table import Init, Weight, weight_table
from megatron_atum.config.schema import ModelConfig

ADDED_ROWS_SEED = 0


def drawn_tensor(name: str, shape: tuple[int, ...], init: Init, seed: int) -> Tensor:
    """A Hugging Face tensor as drawn from a seed, fp32."""
    if init.std == 0.0:
        return torch.full(shape, init.constant)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, init.std, generator=generator)


class Drawn:
    """All weights of a model, drawn from a seed: a TensorSource."""

    def __init__(self, model: ModelConfig, seed: int) -> None:
        self.seed = seed
        self._rows: dict[str, tuple[Weight, int]] = {
            name: (row, part) for row in weight_table(model) for part, name in enumerate(row.hf)
        }
        self._last: tuple[str, Tensor] | None = None  # a large tensor is asked for in slices

    def names(self) -> set[str]:
        return set(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        row, part = self._rows[name]
        return row.shapes[part]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is drawn
            self._last = name, drawn_tensor(name, self.shape(name), self._rows[name][0].init, self.seed)
        tensor = self._last[1]
        return tensor if rows is None else tensor[rows]


class AddedRows:
    """The rows of added tokens, of a source that may have fewer: a TensorSource of these weights only.

    An instruct model has a row for <end_of_utterance> that a base model lacks. Missing rows are drawn as all rows of a
    new model are, from ADDED_ROWS_SEED.
    """

    def __init__(self, model: ModelConfig, source: TensorSource) -> None:
        self._source, self._drawn = source, Drawn(model, ADDED_ROWS_SEED)
        self._names = {name for row in weight_table(model) if row.name.endswith(".added.weight") for name in row.hf}

    def names(self) -> set[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._drawn.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._source.read(name)
        missing = self.shape(name)[0] - len(tensor)
        if missing:
            tensor = torch.cat([tensor, self._drawn.read(name)[-missing:].to(tensor.dtype)])
        return tensor if rows is None else tensor[rows]
