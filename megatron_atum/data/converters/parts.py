"""The files of an input, and the names of what is made of each."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_atum.errors import DataError

END = 64 << 10  # bytes of each end of a file that its fingerprint is made of


@dataclass(frozen=True)
class Part:
    """One input file. `name` begins the names of its shards and the keys of its samples; no dot in it."""

    name: str
    path: str
    size: int  # bytes

    def key(self, row: int) -> str:
        return f"{self.name}-{row:07d}"

    def fingerprint(self) -> dict[str, int | str]:
        """What tells this file from a changed one: its size and the sha256 of its first and last 64 KiB.

        A moved or copied file has the same, which times would not give. Raises DataError when it cannot be read.
        """
        try:
            with open(self.path, "rb") as stream:
                first = stream.read(END)
                stream.seek(max(0, self.size - END))
                last = stream.read(END)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error}); restore it or correct its permissions") from error
        return {"bytes": self.size, "ends_sha256": hashlib.sha256(first + last).hexdigest()}


def find_parts(inputs: Iterable[str], suffixes: tuple[str, ...], out: str | None = None) -> list[Part]:
    """Files of folders (searched through all levels), globs and single files, in the order of their names.

    Args:
        out: folder of the conversion. Nothing below it is an input: it holds JSON files and tars of its own.

    Raises:
        DataError: an input that does not exist or holds no such file; two files that would get the same name; no input
            outside `out`.
    """
    parts: dict[str, Part] = {}
    files = [file for given in inputs for file in _files(given, suffixes)]
    outside = [(root, path) for root, path in files if out is None or not _below(out, path)]
    if files and not outside:
        raise DataError(f"input {files[0][1]} lies in --out {out}, from which nothing is read; choose another --out")
    for root, path in outside:
        part = Part(_name(os.path.relpath(path, root), suffixes), path, os.path.getsize(path))
        other = parts.setdefault(part.name, part)
        if os.path.realpath(other.path) != os.path.realpath(path):
            raise DataError(
                f"{other.path} and {path} would both be called {part.name}; give the folder above both, "
                "or convert them to different folders"
            )
    return [parts[name] for name in sorted(parts)]


def _files(given: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(the folder that names are relative to, path)."""
    if os.path.isfile(given):
        if not given.lower().endswith(suffixes):
            raise DataError(f"input {given} is no file of the kind {', '.join(suffixes)}")
        yield os.path.dirname(given), given
        return
    if os.path.isdir(given):
        root, found = given, list(_walk(given))
    elif glob.has_magic(given):
        root, found = _fixed_start(given), glob.glob(given, recursive=True)
    else:
        raise DataError(f"input {given} does not exist")
    paths = sorted(path for path in found if _wanted(path, suffixes))
    if not paths:
        raise DataError(f"input {given} holds no file of the kind {', '.join(suffixes)}")
    yield from ((root, path) for path in paths)


def _below(folder: str, path: str) -> bool:
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def _walk(folder: str) -> Iterator[str]:
    for root, _, files in os.walk(folder):
        yield from (os.path.join(root, name) for name in files)


def _wanted(path: str, suffixes: tuple[str, ...]) -> bool:
    name = os.path.basename(path)
    # `datasets` keeps its intermediate results beside the data, as cache-FINGERPRINT.arrow.
    hidden = name.startswith((".", "cache-"))
    return name.lower().endswith(suffixes) and not hidden and os.path.isfile(path)


def _fixed_start(pattern: str) -> str:
    """The folder that all matches of a glob share, whichever files there are."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder


def _name(path: str, suffixes: tuple[str, ...]) -> str:
    suffix = max((suffix for suffix in suffixes if path.lower().endswith(suffix)), key=len)
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path[: -len(suffix)]).lstrip("_-") or "part"
