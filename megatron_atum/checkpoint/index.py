"""What tensors a folder of files holds: index.json.

A tensor is stored in chunks, boxes that together are the whole. Any rank may write any box, so a checkpoint does not
remember the layout of the run that wrote it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_atum.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from megatron_atum.errors import CheckpointError

FORMAT = 2
INDEX = "index.json"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes lie."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int  # byte in the file


@dataclass(frozen=True)
class StoredTensor:
    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Index = dict[str, StoredTensor]
Written = tuple[str, torch.dtype, Shape, Chunk]  # key, dtype and shape of the whole, and the chunk that was written


def merge(written: Iterable[Written]) -> Index:
    """The index of what all ranks have written. Every tensor must be there exactly once."""
    found: dict[str, tuple[torch.dtype, Shape, list[Chunk]]] = {}
    for key, dtype, shape, chunk in written:
        entry = found.setdefault(key, (dtype, shape, []))
        assert entry[:2] == (dtype, shape), f"{key} was written as {entry[:2]} and as {dtype, shape}"
        entry[2].append(chunk)
    index = {
        key: StoredTensor(dtype, shape, tuple(sorted(chunks, key=lambda chunk: chunk.offsets)))
        for key, (dtype, shape, chunks) in sorted(found.items())
    }
    for key, tensor in index.items():
        problem = _gap(tensor)
        assert not problem, f"{key}: {problem}"
    return index


def _gap(tensor: StoredTensor) -> str:
    """What keeps the chunks from being the whole tensor, each value once; '' if nothing."""
    for chunk in tensor.chunks:
        if len(chunk.offsets) != len(tensor.shape) or len(chunk.sizes) != len(tensor.shape):
            return f"a chunk has {len(chunk.offsets)} dimensions, the tensor {len(tensor.shape)}"
        for offset, size, limit in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True):
            if offset < 0 or size < 0 or offset + size > limit:
                return f"a chunk {chunk.offsets} + {chunk.sizes} lies outside {tensor.shape}"
    volume = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
    if volume != math.prod(tensor.shape):
        return f"its chunks hold {volume} of {math.prod(tensor.shape)} values"
    return _overlap([chunk for chunk in tensor.chunks if math.prod(chunk.sizes)])


def _overlap(chunks: list[Chunk]) -> str:
    chunks.sort(key=lambda chunk: chunk.offsets)
    for number, one in enumerate(chunks):
        for other in chunks[number + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break  # so do all behind it
            apart = any(
                a >= b + size or b >= a + other_size
                for a, b, size, other_size in zip(other.offsets, one.offsets, one.sizes, other.sizes, strict=True)
            )
            if not apart:
                return f"the chunks at {one.offsets} and {other.offsets} overlap"
    return ""


def to_json(index: Index) -> str:
    """One line per tensor."""
    files = sorted({chunk.file for tensor in index.values() for chunk in tensor.chunks})
    number = {file: place for place, file in enumerate(files)}
    lines = [
        json.dumps(key) + ": " + json.dumps(_tensor_json(tensor, number), separators=(",", ":"))
        for key, tensor in index.items()
    ]
    head = f'{{"format": {FORMAT},\n"files": {json.dumps(files)},\n"tensors": {{\n'
    return head + ",\n".join(lines) + "\n}}\n"


def _tensor_json(tensor: StoredTensor, number: dict[str, int]) -> dict[str, Any]:
    chunks = [[c.offsets, c.sizes, number[c.file], c.start] for c in tensor.chunks]
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "chunks": chunks}


def read_index(folder: Path) -> Index:
    """The tensors of a folder. Nothing in the file is trusted.

    Raises:
        CheckpointError: it cannot be read, or describes what cannot be.
    """
    path = folder / INDEX
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, and this version reads {FORMAT}")
        files = [_plain_name(name) for name in content["files"]]
        index = {key: _tensor(value, files) for key, value in content["tensors"].items()}
        for key, tensor in index.items():
            if problem := _gap(tensor):
                raise ValueError(f"{key}: {problem}")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from None
    return index


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise ValueError(f"it names {name!r}, which is not a file of this folder")
    return name


def _tensor(value: dict[str, Any], files: list[str]) -> StoredTensor:
    chunks = tuple(
        Chunk(_shape(offsets), _shape(sizes), files[_natural(file)], _natural(start))
        for offsets, sizes, file, start in value["chunks"]
    )
    return StoredTensor(DTYPES[value["dtype"]], _shape(value["shape"]), chunks)


def _shape(value: Any) -> Shape:
    return tuple(_natural(number) for number in value)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is not a natural number")
    return value
