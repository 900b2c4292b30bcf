"""Copies a step and the frozen weights that it needs into one folder that needs no other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash
from tqdm import tqdm

from megatron_atum.checkpoint.files import check_room, new_folder, refuse_existing, write_json
from megatron_atum.checkpoint.folder import ASSETS, STATE, folders_of, read_record
from megatron_atum.checkpoint.index import INDEX, Written, read_index
from megatron_atum.checkpoint.stored import RunState, StoredCheckpoint, complete, write_state
from megatron_atum.checkpoint.tensor_file import PIECE_BYTES, FileRecord, ahead, checksum_of
from megatron_atum.errors import CheckpointError

_TRAINING = ("optimizer.", "random/")  # how keys begin that are not weights
_SPARE = 64 << 20  # room for the index and other small files


@dataclass(frozen=True)
class _File:
    """A file to copy, what is known of it, and its name in the copy."""

    folder: Path
    record: FileRecord
    name: str


def copy_standalone(folder: Path, out: Path, *, weights_only: bool = False, progress: bool = False) -> None:
    """Copy a checkpoint byte for byte, whole or not at all; what is copied is compared with its checksums.

    Args:
        folder: of a step.
        weights_only: leave the state of optimizer and random numbers out, so that a run can start from the copy and
            not go on from it.

    Raises:
        CheckpointError: `out` exists, there is no room, or the checkpoint is incomplete or damaged.
    """
    refuse_existing(out)
    state = StoredCheckpoint(folder).state
    places = folders_of(folder)
    _check_described(places)
    written = [chunk for place in places for chunk in _tensors(place, _prefix(place, folder), weights_only)]
    used = {chunk.file for _, _, _, chunk in written}
    files = [file for place in places for file in _files(place, _prefix(place, folder), used)]
    total = sum(file.record.size for file in files)
    with (
        new_folder(out) as aside,
        tqdm(total=total, desc=f"copying {folder.name}", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        check_room(aside, total + _SPARE)
        records = [_copy(file, aside / file.name, bar.update) for file in files]
        _write_state(aside, state, weights_only)
        complete(aside, [record for record in records if not record.name.startswith(f"{ASSETS}/")], written)


def _prefix(place: Path, folder: Path) -> str:
    """Files of both folders may have the same names."""
    return "" if place == folder else "frozen-"


def _check_described(places: list[Path]) -> None:
    """The files that say what the others are. Raises CheckpointError where one is damaged."""
    for place in places:
        for record in read_record(place):
            if record.name in (INDEX, STATE):
                _check(place, record, checksum_of(place / record.name))


def _check(place: Path, record: FileRecord, checksum: str) -> None:
    if checksum != record.checksum:
        raise CheckpointError(
            f"{place / record.name} is damaged: it does not hold what was written (checksum); nothing was copied. "
            "Use another step, or a whole copy of this one"
        )


def _tensors(place: Path, prefix: str, weights_only: bool) -> Iterator[Written]:
    """The chunks to keep, by the names that files have in the copy."""
    for key, tensor in read_index(place).items():
        if not (weights_only and key.startswith(_TRAINING)):
            for chunk in tensor.chunks:
                yield key, tensor.dtype, tensor.shape, replace(chunk, file=prefix + chunk.file)


def _files(place: Path, prefix: str, used: set[str]) -> Iterator[_File]:
    for record in read_record(place):
        if prefix + record.name in used:
            yield _File(place, record, prefix + record.name)
        elif record.name.startswith(f"{ASSETS}/"):
            yield _File(place, record, record.name)


def _copy(file: _File, target: Path, progress: Callable[[int], object]) -> FileRecord:
    """Raises CheckpointError where the file does not hold what its record says."""
    total, source = xxhash.xxh3_128(), file.folder / file.record.name
    target.parent.mkdir(exist_ok=True)
    with target.open("wb", buffering=0) as out:
        for piece in ahead(_pieces(source)):
            total.update(piece)
            _write(out.fileno(), piece)
            progress(len(piece))
    _check(file.folder, file.record, total.hexdigest())
    return FileRecord(file.name, file.record.size, file.record.checksum)


def _write(fd: int, piece: bytes) -> None:
    left = memoryview(piece)
    while left:
        left = left[os.write(fd, left) :]


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None


def _write_state(aside: Path, state: RunState, weights_only: bool) -> None:
    if weights_only:
        write_state(aside, step=state.step, config=state.config, frozen=None, versions=state.versions)
    else:
        write_json(aside / STATE, json.loads((state.folder / STATE).read_text()) | {"frozen": None})
