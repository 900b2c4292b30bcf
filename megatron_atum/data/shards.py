"""Shard format v1: WebDataset tars of documents or of image-text pairs, read and written as raw bytes.

Documents: `KEY.json`, then the images `KEY.000.jpg`, `KEY.001.png`, ... `KEY.json` holds
`{"version": 1, "source", "texts", "images", "missing", "meta"}`; `texts` and `images` have equal length and exactly
one of `texts[i]`, `images[i]` is not null. `images[i]` is the member's name after `KEY.`, or "" for an image that was
lost, with the reason under `missing["i"]`.
Pairs: `KEY.jpg` (png, webp), `KEY.txt`, and optionally `KEY.json`.
A KEY has no dot and is unique in its data set; its members are adjacent in the tar.

webdataset's `.decode()` is never used: it unpickles some members.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from webdataset.writer import TarWriter

from megatron_atum.errors import DataError

FORMAT_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes of a tar block
OPEN_FILES = 64  # most shards a reader keeps open
_MEMBER_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")
_MAGIC = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"), (b"RIFF", "webp"))


@dataclass
class DocumentRecord:
    """One interleaved document to be written. At each place exactly one of text and image, or a lost image."""

    key: str
    texts: list[str | None]
    images: list[bytes | None]
    source: str = ""
    missing: dict[int, str] = field(default_factory=dict)  # place of a lost image -> reason
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class PairRecord:
    """One image with its caption to be written."""

    key: str
    image: bytes
    text: str
    meta: dict[str, Any] | None = None


class Member(NamedTuple):
    """Where the bytes of a member lie in its shard."""

    offset: int
    size: int


@dataclass
class StoredSample:
    """Adjacent members of one key, by name after `KEY.`."""

    key: str
    members: dict[str, Member]

    def image_names(self) -> list[str]:
        return [name for name in self.members if name.rsplit(".", 1)[-1].lower() in IMAGE_SUFFIXES]


def write_shard(path: str | os.PathLike[str], records: Iterable[DocumentRecord | PairRecord]) -> int:
    """Writes a shard and returns its number of samples.

    The same records give the same bytes, and the file appears under its name only when it is complete.

    Raises:
        DataError: a key with a dot or used twice, a malformed document, an unknown image format.
    """
    path = os.fspath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    keys: set[str] = set()
    try:
        with open(temporary, "wb") as stream:
            with TarWriter(stream, encoder=False, mtime=0, user="atum", group="atum") as writer:
                for record in records:
                    _check_key(record.key, keys, path)
                    for name, content in _members(record, path):
                        # One member a call: TarWriter would sort a document's images before its json.
                        writer.write({"__key__": record.key, name: content})
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return len(keys)


def expand_shards(pattern: str) -> list[str]:
    """Sorted paths of the shards a glob names. Raises DataError when there are none."""
    if pattern.endswith(".json"):
        raise DataError(f"{pattern}: manifests cannot be read yet; give a glob of shards, e.g. shards/*.tar")
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not paths:
        raise DataError(f"no shard matches {pattern}; correct the source's `shards` or write the shards first")
    return paths


def scan_shard(path: str) -> Iterator[StoredSample]:
    """Samples of a shard in order, from its headers alone. A key that comes back later is a sample of its own.

    Raises:
        DataError: the shard is missing, compressed, damaged or cut off.
    """
    sample: StoredSample | None = None
    for name, member in _scan_members(path):
        match = _MEMBER_NAME.match(name)
        # A member without KEY and suffix becomes a sample without usable members, so that it is counted.
        key, suffix = match.groups() if match else (name, "")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = StoredSample(key, {})
        sample.members[suffix] = member
    if sample is not None:
        yield sample


class ShardReader:
    """Reads single members by offset and keeps a bounded number of shards open."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def read(self, path: str, member: Member) -> bytes:
        """Content of a member. Raises DataError when the shard is gone or shorter than it was."""
        try:
            data = os.pread(self._open(path), member.size, member.offset)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read ({error}); restore it") from error
        if len(data) != member.size:
            raise DataError(f"shard {path} ends before byte {member.offset + member.size}; restore it and start again")
        return data

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, path: str) -> int:
        if path not in self._files:
            if len(self._files) >= OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}}  # file descriptors belong to one process


def read_shard(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {name: content}) of every sample: for tools and tests; training reads by index. Raises DataError."""
    reader = ShardReader()
    try:
        for sample in scan_shard(path):
            yield sample.key, {name: reader.read(path, member) for name, member in sample.members.items()}
    finally:
        reader.close()


def image_suffix(data: bytes, where: str) -> str:
    """jpg, png or webp by the first bytes of an image. Raises DataError for anything else."""
    for magic, suffix in _MAGIC:
        if data.startswith(magic):
            return suffix
    raise DataError(f"{where}: image is neither JPEG, PNG nor WebP; convert it first")


def _members(record: DocumentRecord | PairRecord, path: str) -> Iterator[tuple[str, bytes]]:
    """Names after `KEY.` and contents, in the order in which they are stored."""
    where = f"{path}, key {record.key}"
    if isinstance(record, PairRecord):
        yield image_suffix(record.image, where), record.image
        yield "txt", record.text.encode()
        if record.meta is not None:
            yield "json", _json(record.meta)
        return
    names: list[str | None] = []
    images: list[tuple[str, bytes]] = []
    for place, (text, image) in enumerate(zip(record.texts, record.images, strict=True)):
        lost = place in record.missing
        if (text is not None) + (image is not None) + lost != 1:
            raise DataError(f"{where}: place {place} needs exactly one of a text, an image and a reason under missing")
        if image is not None:
            images.append((f"{len(images):03d}.{image_suffix(image, where)}", image))
            names.append(images[-1][0])
        else:
            names.append("" if lost else None)
    yield "json", _json(_document_json(record, names))
    yield from images


def _document_json(record: DocumentRecord, names: list[str | None]) -> dict[str, Any]:
    return {
        "version": FORMAT_VERSION,
        "source": record.source,
        "texts": record.texts,
        "images": names,
        "missing": {str(place): reason for place, reason in sorted(record.missing.items())},
        "meta": record.meta,
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _check_key(key: str, seen: set[str], path: str) -> None:
    if not key or "." in key or key.startswith("_"):
        raise DataError(f"{path}: key {key!r} must not be empty, contain a dot or start with an underscore; rename it")
    if key in seen:
        raise DataError(f"{path}: key {key!r} is used twice; keys must be unique in a data set")
    seen.add(key)


def _scan_members(path: str) -> Iterator[tuple[str, Member]]:
    """Names and places of the regular files of a tar.

    tarfile ends quietly at a damaged header and at the end of a cut file. So the end is checked here: a complete
    tar has a block of zeros behind its last member.
    """
    end = 0
    try:
        with open(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if info.isfile():
                    yield info.name, Member(info.offset_data, info.size)
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
            stream.seek(end)
            if stream.read(BLOCK) != bytes(BLOCK):
                raise DataError(f"shard {path} is damaged or cut off at byte {end}; copy or write it again")
    except FileNotFoundError as error:
        raise DataError(f"shard {path} does not exist; restore it or correct the source's `shards`") from error
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"shard {path} is no complete uncompressed tar ({error}); copy or write it again") from error
