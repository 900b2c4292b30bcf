"""Safetensors files, written in one pass and read at given places.

The safetensors package writes a file from tensors that are all in memory, and maps a file that it reads. A model of
160 GB on a host with little memory needs neither: here the header is written first, tensors follow piece by piece with
a running checksum, and reading fills a buffer of just the bytes that are asked for. The files are plain safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from megatron_atum.checkpoint.direct_file import DirectFile
from megatron_atum.errors import CheckpointError

# Names of the safetensors format, for what we read or write.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE_BYTES = 4 << 20  # read, checked and written at a time: it fits into a cache, and malloc hands it out again
_MAX_HEADER = 100_000_000  # the limit of the safetensors package
_MAX_READ = 1 << 30  # Linux reads at most 2 GiB in one call
_DROP_AGAIN = 32 << 20
_AHEAD = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: `start` is its first byte in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """What a completion record says of a file."""

    name: str
    size: int
    checksum: str  # XXH3, 128 bits, hexadecimal


class TensorFileWriter:
    """Writes a file whose tensors are known beforehand, by name, dtype and shape."""

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]],
        metadata: dict[str, str] | None = None,
    ) -> None:
        self.path = path
        header, self.entries = _header(tensors, metadata)
        self._hash = xxhash.xxh3_128()
        self._size = self.entries[-1].start + self.entries[-1].size if self.entries else len(header)
        self._written = 0
        self._file = DirectFile(path)
        self._put(header)

    def write(self, tensor: Tensor) -> None:
        """The next values: a tensor, or pieces of it one after the other, in the order of the tensors."""
        self._put(as_bytes(tensor))

    def close(self) -> FileRecord:
        """Wait until everything is on disk."""
        assert self._written == self._size, (self.path, self._written, self._size)
        self._file.close()
        return FileRecord(self.path.name, self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        self._file.abandon()

    def _put(self, content: bytes | memoryview) -> None:
        self._hash.update(content)
        self._written += len(content)
        self._file.write(content)


def _header(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: dict[str, str] | None
) -> tuple[bytes, list[Entry]]:
    content: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for name, dtype, shape in tensors:
        end = place + math.prod(shape) * dtype.itemsize
        content[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    entries = [
        Entry(name, dtype, tuple(shape), first + content[name]["data_offsets"][0]) for name, dtype, shape in tensors
    ]
    return len(text).to_bytes(8, "little") + text, entries


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat = tensor.detach().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


class TensorFile:
    """A safetensors file that is read at given places, never mapped.

    Args:
        once: see `read_tensor`.

    Raises:
        CheckpointError: not such a file, or one whose header promises what is not there.
    """

    def __init__(self, path: Path, *, once: bool = False) -> None:
        self.path, self.once = path, once
        try:
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        try:
            self.entries = self._read_entries()
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some rows (of its first dimension). Raises CheckpointError."""
        entry = self.entries[name]
        if rows is None or not entry.shape:
            return read_tensor(self._fd, self.path, entry.start, entry.shape, entry.dtype, once=self.once)
        first, last, _ = rows.indices(entry.shape[0])
        row_bytes = entry.size // max(1, entry.shape[0])
        shape = (max(0, last - first), *entry.shape[1:])
        return read_tensor(self._fd, self.path, entry.start + first * row_bytes, shape, entry.dtype, once=self.once)

    def _read_entries(self) -> dict[str, Entry]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(f"{self.path} is not a safetensors file, or it is cut short")
        try:
            content = json.loads(os.pread(self._fd, length, 8))
            content.pop("__metadata__", None)
            entries = {name: _entry(name, value, 8 + length, size) for name, value in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{self.path} has a damaged header: {error}") from None
        _check_apart(self.path, list(entries.values()))
        return entries


def _entry(name: str, value: dict[str, Any], first: int, file_size: int) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the dtype {value['dtype']}, which is not supported")
    (begin, end), shape = value["data_offsets"], tuple(value["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name} has the shape {shape} and the place {begin}..{end}")
    entry = Entry(name, DTYPES[value["dtype"]], shape, first + begin)
    if end - begin != entry.size or entry.start + entry.size > file_size:
        raise ValueError(f"{name} does not lie inside the file")
    return entry


def _check_apart(path: Path, entries: list[Entry]) -> None:
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.size)):
        if entry.start < end:
            raise CheckpointError(f"{path} has a damaged header: {entry.name} lies over another tensor")
        end = entry.start + entry.size


def read_tensor(
    fd: int, path: Path, start: int, shape: Sequence[int], dtype: torch.dtype, *, once: bool = False
) -> Tensor:
    """Fill a new tensor from byte `start` of an open file.

    Args:
        once: the file is read from start to end and not again; what was read does not stay in the page cache.

    Raises:
        CheckpointError: the file is too short, or cannot be read.
    """
    tensor = torch.empty(tuple(shape), dtype=dtype)
    left, place = as_bytes(tensor), start
    while left:
        try:
            count = os.preadv(fd, [left[:_MAX_READ]], place)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path} is cut short: it ends before byte {place + len(left)}")
        left, place = left[count:], place + count
    if once:  # the kernel keeps what only a part of a larger page was dropped of, hence some of what lies before
        first = max(0, start - _DROP_AGAIN)
        os.posix_fadvise(fd, first, place - first, os.POSIX_FADV_DONTNEED)
    return tensor


def row_slices(shape: Sequence[int], itemsize: int, most_bytes: int = PIECE_BYTES) -> Iterator[slice]:
    """Slices of the first dimension that hold at most `most_bytes` (at least one row each)."""
    if not shape:
        yield slice(None)
        return
    rows = max(1, most_bytes // max(1, math.prod(shape[1:]) * itemsize))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


def checksum_of(path: Path) -> str:
    """Checksum of a file's content. Raises CheckpointError."""
    total, buffer = xxhash.xxh3_128(), bytearray(8 << 20)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total.update(memoryview(buffer)[:count])
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return total.hexdigest()


def check_finite(tensor: Tensor, where: Callable[[], str]) -> None:
    """Raises CheckpointError where a value is NaN or infinite. One pass over the tensor, no copy of it."""
    if tensor.numel() and not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
        raise CheckpointError(f"{where()} holds NaN or infinite values")


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A contiguous tensor in another dtype. Raises CheckpointError where values are too large for it."""
    if tensor.dtype == dtype:
        return tensor.contiguous()
    changed = tensor.to(dtype).contiguous()
    try:
        check_finite(changed, lambda: name)
    except CheckpointError:
        what = str(dtype).removeprefix("torch.")
        raise CheckpointError(f"{name} has values that are too large for {what}; choose another dtype") from None
    return changed


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, made in a thread while those before them are used. A few exist at a time."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = deque(pool.submit(next, iterator, end) for _ in range(_AHEAD))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
