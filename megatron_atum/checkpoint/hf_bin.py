"""Reading `.bin` files of torch at given places: the pickle in them is read with torch's restricted loader, which
runs no code, and only for names, shapes and places; the values are then read where they lie, as of safetensors."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_atum.checkpoint.tensor_file import Entry, TensorFile, read_tensor
from megatron_atum.errors import CheckpointError

_ZIP = b"PK\x03\x04"
_ANEW = (
    'write it anew: python -c "import sys, torch; file = sys.argv[1]; '
    'torch.save(torch.load(file, weights_only=True), file)" FILE'
)


class BinFile(TensorFile):
    """A file written by `torch.save` (since torch 1.6), holding a dictionary of tensors.

    Raises:
        CheckpointError: another kind of file, one with more than tensors in it, or one that promises what is not there.
    """

    _strides: dict[str, tuple[int, ...]]  # of tensors whose values do not lie in order

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        if name not in self._strides:
            return super().read(name, rows)
        entry, strides = self.entries[name], self._strides[name]
        first, last, _ = (rows or slice(None)).indices(entry.shape[0])
        shape = (max(0, last - first), *entry.shape[1:])
        start = entry.start + first * strides[0] * entry.dtype.itemsize
        values = read_tensor(self._fd, self.path, start, (_span(shape, strides),), entry.dtype, once=self.once)
        return values.as_strided(shape, strides).contiguous()

    def _read_entries(self) -> dict[str, Entry]:
        self._strides = {}
        if os.pread(self._fd, len(_ZIP), 0) != _ZIP:
            raise CheckpointError(f"{self.path} is not a file of torch.save, or one from before torch 1.6; {_ANEW}")
        records = _records(self.path, self._fd)
        return {name: self._entry(name, tensor, records) for name, tensor in _tensors(self.path).items()}

    def _entry(self, name: str, tensor: Tensor, records: dict[int, int]) -> Entry:
        shape, place = tuple(tensor.shape), tensor.untyped_storage()._checkpoint_offset
        if place is None:
            raise CheckpointError(f"{self.path}: torch {torch.__version__} does not tell where tensors lie; update it")
        first = int(tensor.storage_offset()) * tensor.dtype.itemsize
        size = _span(shape, tensor.stride()) * tensor.dtype.itemsize
        if first + size > records.get(place, -1):
            raise CheckpointError(f"{self.path} is damaged or packed again: {name} is not in its place; {_ANEW}")
        if not tensor.is_contiguous():
            self._strides[name] = tensor.stride()
        return Entry(name, tensor.dtype, shape, place + first)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Values from the first to the last one of a tensor, with those between that are not its own."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else 0


def _tensors(path: Path) -> dict[str, Tensor]:
    """The dictionary in a file; its tensors have no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and few folders need it

    try:
        with FakeTensorMode():
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the loader raises what the bytes lead it to
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it wants to call {found[1]}" if found else str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{path} is not loaded: it is damaged or holds more than tensors ({why})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {name!r} is not a plain tensor; save a state_dict only")
    return content


def _records(path: Path, fd: int) -> dict[int, int]:
    """Place and size of every file in the archive. Raises CheckpointError."""
    records, keys = {}, []
    try:
        with zipfile.ZipFile(path) as archive:
            for record in sorted(archive.infolist(), key=lambda record: record.header_offset):
                if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                    raise CheckpointError(f"{path} has compressed parts; {_ANEW}")
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise CheckpointError(f"{path} was written on a big-endian machine; {_ANEW}")
                lengths = os.pread(fd, 4, record.header_offset + 26)  # of name and extra field, which precede the bytes
                names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                records[record.header_offset + 30 + names] = record.file_size
                keys += re.findall(r"^[^/]*/data/(\d+)$", record.filename)
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
    if keys != [str(number) for number in range(len(keys))]:  # the places that torch reckons would be others
        raise CheckpointError(f"{path} was packed again by another program; {_ANEW}")
    return records
