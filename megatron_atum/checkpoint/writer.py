"""Writes chunks of tensors into files of a folder, in one pass and with little memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_atum.checkpoint.index import Chunk, Shape, Written
from megatron_atum.checkpoint.tensor_file import FileRecord, TensorFileWriter, ahead

FILE_BYTES = 2 << 30  # files are about this large, so that ranks can share the checking of them


@dataclass(frozen=True)
class Item:
    """A chunk to write. `pieces` gives its values in order, as contiguous CPU tensors of `dtype`."""

    key: str
    dtype: torch.dtype
    shape: Shape  # of the whole tensor
    offsets: Shape
    sizes: Shape
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.sizes) * self.dtype.itemsize

    @property
    def name(self) -> str:
        """In the file: the key, with the box where it is not the whole tensor."""
        if self.sizes == self.shape:
            return self.key
        box = ",".join(f"{o}:{o + s}" for o, s in zip(self.offsets, self.sizes, strict=True))
        return f"{self.key}[{box}]"


def write_items(
    folder: Path, prefix: str, items: Iterable[Item], progress: Callable[[int], object] = lambda count: None
) -> tuple[list[FileRecord], list[Written]]:
    """Write the files `prefix-0.safetensors` and so on; all are on disk when it returns.

    Args:
        progress: called with the number of bytes of each piece that was written.
    """
    records: list[Future[FileRecord]] = []
    written: list[Written] = []
    with ThreadPoolExecutor(1, thread_name_prefix="sync") as pool:  # a file goes to disk while the next is written
        for number, batch in enumerate(_batches(items)):
            writer = _write_file(folder / f"{prefix}-{number}.safetensors", batch, progress)
            records.append(pool.submit(writer.close))
            written += [
                (item.key, item.dtype, item.shape, Chunk(item.offsets, item.sizes, writer.path.name, entry.start))
                for item, entry in zip(batch, writer.entries, strict=True)
            ]
    return [record.result() for record in records], written


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        if batch and size + item.size > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.size
    if batch:
        yield batch


def _write_file(path: Path, items: list[Item], progress: Callable[[int], object]) -> TensorFileWriter:
    """A file with all its values, to be closed."""
    writer = TensorFileWriter(path, [(item.name, item.dtype, item.sizes) for item in items])
    try:
        for piece in ahead(piece for item in items for piece in item.pieces()):
            writer.write(piece)
            progress(piece.nbytes)
    except BaseException:
        writer.abandon()
        raise
    return writer
