"""Writing so that a crash leaves either the whole or nothing."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_atum.errors import CheckpointError


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def aside_of(path: Path) -> Path:
    """Where a folder is written before it is renamed into place."""
    return path.with_name(path.name + ".tmp")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder written aside and renamed into place when the block ends well; removed when it does not.

    Raises:
        CheckpointError: something has got its name meanwhile.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")  # a name that nothing else has
    aside.mkdir(parents=True)
    try:
        yield aside
        for place, _, files in os.walk(aside):
            for file in files:
                sync(Path(place, file))
        refuse_existing(path)
        _put_in_place(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def commit_folder(aside: Path, path: Path) -> None:
    """Rename a folder into place whose files are on disk; it replaces one of this name."""
    old = None
    if path.exists():
        old = path.with_name(f"{path.name}.{secrets.token_hex(4)}.old.tmp")
        path.rename(old)
    _put_in_place(aside, path)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _put_in_place(aside: Path, path: Path) -> None:
    for place, _, _ in os.walk(aside):
        sync(Path(place))
    aside.rename(path)
    sync(path.parent)


def refuse_existing(out: Path) -> None:
    """Raises CheckpointError where something has this name already."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; choose another folder or remove it")


def check_room(folder: Path, wanted: int) -> None:
    """Raises CheckpointError if a disk has less than `wanted` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise CheckpointError(f"{folder.parent} has {free / 1e9:.1f} GB free; {wanted / 1e9:.1f} GB are needed")
