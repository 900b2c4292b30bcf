"""Reads boxes of stored tensors, whatever boxes they were written in.

Which part of which chunk a box needs is torch.distributed.checkpoint's resharding. The reader is one of its storage
readers, so `torch.distributed.checkpoint.load(state_dict, storage_reader=CheckpointReader(folder))` works too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_atum.checkpoint.index import Chunk, Index, StoredTensor, read_index
from megatron_atum.checkpoint.tensor_file import read_tensor
from megatron_atum.errors import CheckpointError

MOST_OPEN = 64


class CheckpointReader(StorageReader):
    """The tensors of some folders (a step and its frozen weights), each with an index.json.

    Args:
        once: each value is read once (`read_tensor`).

    Raises:
        CheckpointError: an index cannot be used, or two folders hold the same tensor.
    """

    def __init__(self, *folders: Path, once: bool = False) -> None:
        self.index: Index = {}
        self._once = once
        self._folder_of: dict[str, Path] = {}
        for folder in folders:
            index = read_index(folder)
            twice = sorted(index.keys() & self.index.keys())
            if twice:
                raise CheckpointError(f"{folder} and {self._folder_of[twice[0]]} both hold {twice[0]}")
            self.index.update(index)
            self._folder_of.update(dict.fromkeys(index, folder))
        self.metadata = to_metadata(self.index)
        self._files: dict[Path, int] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of a tensor, as it is stored. Raises CheckpointError."""
        metadata = self.metadata.state_dict_metadata[key]
        box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, metadata, [box])  # type: ignore[arg-type]
        stored = self.index[key]
        if len(items) == 1 and tuple(items[0].lengths) == tuple(sizes):
            return self._read_item(stored, items[0])
        result = torch.empty(tuple(sizes), dtype=stored.dtype)
        found = 0
        for item in items:
            result[_slices(item.dest_offsets, item.lengths)] = self._read_item(stored, item)
            found += math.prod(item.lengths)
        if found != result.numel():
            raise CheckpointError(f"{self._folder_of[key]} holds only a part of {key}")
        return result

    def _read_item(self, stored: StoredTensor, item: ReadItem) -> Tensor:
        """The part of a chunk that an item names. Only its rows are read."""
        chunk = self._chunk(stored, item)
        path = self._folder_of[item.storage_index.fqn] / chunk.file
        if not chunk.sizes:
            return read_tensor(self._open(path), path, chunk.start, (), stored.dtype)
        row_bytes = math.prod(chunk.sizes[1:]) * stored.dtype.itemsize
        start = chunk.start + item.storage_offsets[0] * row_bytes
        shape = (item.lengths[0], *chunk.sizes[1:])
        rows = read_tensor(self._open(path), path, start, shape, stored.dtype, once=self._once)
        return rows[_slices((0, *item.storage_offsets[1:]), item.lengths)]

    def _chunk(self, stored: StoredTensor, item: ReadItem) -> Chunk:
        place = item.storage_index.index
        if place is not None and stored.chunks[place].offsets == tuple(item.storage_index.offset or ()):
            return stored.chunks[place]
        return next(chunk for chunk in stored.chunks if chunk.offsets == tuple(item.storage_index.offset or ()))

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) == MOST_OPEN:  # a run of 512 ranks writes more files than a process may have open
                os.close(self._files.pop(next(iter(self._files))))
            try:
                self._files[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        return self._files[path]

    # What torch.distributed.checkpoint asks of a storage reader --------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self._read_item(self.index[item.storage_index.fqn], item))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return Path(checkpoint_id).is_dir()


def to_metadata(index: Index) -> Metadata:
    """What an index says, for torch.distributed.checkpoint."""
    return Metadata(
        {
            key: TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype),
                torch.Size(tensor.shape),
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
            )
            for key, tensor in index.items()
        }
    )


def _slices(offsets: Sequence[int], lengths: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
