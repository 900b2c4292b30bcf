"""How the tensors of one weight are split over tensor ranks, one class per kind, each with its inverse.

`to_local` takes the Hugging Face tensors of a weight (several where ours is fused) and gives what one tensor rank
holds; `to_full` takes what all tensor ranks hold and gives the Hugging Face tensors back, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replicated:
    """Every rank holds all of it. `shape`: ours, where it differs from Hugging Face's."""

    shape: tuple[int, ...] | None = None
    hf_shape: tuple[int, ...] | None = None

    def to_local(self, tensors: list[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0] if self.shape is None else tensors[0].reshape(self.shape)

    def to_full(self, shards: list[Tensor]) -> list[Tensor]:
        return [shards[0] if self.hf_shape is None else shards[0].reshape(self.hf_shape)]


@dataclass(frozen=True)
class Split:
    """Split along one dimension: 0 for column-parallel weights, 1 for row-parallel ones."""

    dim: int

    def to_local(self, tensors: list[Tensor], rank: int, size: int) -> Tensor:
        return tensors[0].chunk(size, self.dim)[rank]

    def to_full(self, shards: list[Tensor]) -> list[Tensor]:
        return [torch.cat(shards, self.dim)]


@dataclass(frozen=True)
class Fused:
    """Several column-parallel weights one behind the other on each rank (gate and up; key and value)."""

    parts: int = 2

    def to_local(self, tensors: list[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size)[rank] for tensor in tensors])

    def to_full(self, shards: list[Tensor]) -> list[Tensor]:
        pieces = [shard.chunk(self.parts) for shard in shards]
        return [torch.cat([piece[part] for piece in pieces]) for part in range(self.parts)]


@dataclass(frozen=True)
class HeadsInterleaved:
    """Query, key and value of each head next to each other, as megatron-core's linear_qkv holds them.

    `split=False`: interleaved, but whole on every rank (the vision tower).
    """

    heads: int
    split: bool = True

    def to_local(self, tensors: list[Tensor], rank: int, size: int) -> Tensor:
        by_head = torch.stack([tensor.unflatten(0, (self.heads, -1)) for tensor in tensors], dim=1)
        mine = by_head.chunk(size)[rank] if self.split else by_head
        return mine.flatten(0, 2)

    def to_full(self, shards: list[Tensor]) -> list[Tensor]:
        whole = torch.cat(shards) if self.split else shards[0]
        by_head = whole.unflatten(0, (self.heads, 3, -1))
        return [part.flatten(0, 1) for part in by_head.unbind(1)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows split over ranks after padding with zeros to a multiple of their number."""

    rows: int

    def to_local(self, tensors: list[Tensor], rank: int, size: int) -> Tensor:
        share = -(-self.rows // size)
        piece = tensors[0][rank * share : (rank + 1) * share]
        return torch.nn.functional.pad(piece, (0, 0, 0, share - piece.shape[0]))

    def to_full(self, shards: list[Tensor]) -> list[Tensor]:
        return [torch.cat(shards)[: self.rows]]


Rule = Replicated | Split | Fused | HeadsInterleaved | Vocabulary
