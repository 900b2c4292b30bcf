"""Shard format v1: WebDataset tars of documents, image-text pairs or conversations, read and written as raw bytes.

Documents: `KEY.json`, then the images `KEY.000.jpg`, `KEY.001.png`, ... `KEY.json` holds
`{"version": 1, "source", "texts", "images", "missing", "meta"}`; `texts` and `images` have equal length and exactly
one of `texts[i]`, `images[i]` is not null. `images[i]` is the member's name after `KEY.`, or "" for an image that was
lost, with the reason under `missing["i"]`.
Pairs: `KEY.jpg` (png, webp), `KEY.txt`, and optionally `KEY.json`.
Conversations: `KEY.json`, then the images as for documents. `KEY.json` holds `{"version": 1, "source", "turns",
"meta"}`; a turn is `{"role": "system" | "user" | "assistant", "content"}`, its content a list of texts and
`{"image": "000.jpg"}` in their order. A system turn comes first.
A KEY has no dot and is unique in its data set; its members are adjacent in the tar.

webdataset's `.decode()` is never used: it unpickles some members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from webdataset.writer import TarWriter

from megatron_atum.data.scan import ShardScan
from megatron_atum.data.storage import Storage
from megatron_atum.data.text import SPEAKERS
from megatron_atum.errors import DataError

FORMAT_VERSION = 1
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


@dataclass
class ConversationRecord:
    """One conversation to be written."""

    key: str
    turns: list[tuple[str, list[str | bytes]]]  # role, then texts and images in their order
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


Record = DocumentRecord | PairRecord | ConversationRecord


def write_shard(path: str | os.PathLike[str], records: Iterable[Record]) -> int:
    """Writes a shard and returns its number of samples.

    The same records give the same bytes, and the file appears under its name only when it is complete.

    Raises:
        DataError: a key with a dot or used twice, a malformed sample, an unknown image format.
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
                        # One member a call: TarWriter would sort images before their json.
                        writer.write({"__key__": record.key, name: content})
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return len(keys)


def read_shard(path: str | os.PathLike[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {name: content}) of every sample: for tools and tests; training reads by index.

    Raises:
        DataError: the shard is missing, compressed, damaged or cut off.
    """
    path, storage = os.fspath(path), Storage()
    scan = ShardScan(storage, path)
    for sample in scan:
        if not sample.cut_off:
            yield sample.key, {name: storage.read(path, *member) for name, member in sample.members.items()}
    storage.close()
    if scan.damage:
        raise DataError(f"shard {path} is {scan.damage}; copy or write it again")


def image_suffix(data: bytes, where: str) -> str:
    """jpg, png or webp by the first bytes of an image. Raises DataError for anything else."""
    for magic, suffix in _MAGIC:
        if data.startswith(magic):
            return suffix
    raise DataError(f"{where}: image is neither JPEG, PNG nor WebP; convert it first")


def _members(record: Record, path: str) -> Iterator[tuple[str, bytes]]:
    """Names after `KEY.` and contents, in the order in which they are stored."""
    where = f"{path}, key {record.key}"
    if isinstance(record, PairRecord):
        return _pair_members(record, where)
    if isinstance(record, ConversationRecord):
        return _conversation_members(record, where)
    return _document_members(record, where)


def _pair_members(record: PairRecord, where: str) -> Iterator[tuple[str, bytes]]:
    yield image_suffix(record.image, where), record.image
    yield "txt", record.text.encode()
    if record.meta is not None:
        yield "json", _json(record.meta)


def _conversation_members(record: ConversationRecord, where: str) -> Iterator[tuple[str, bytes]]:
    images: list[tuple[str, bytes]] = []
    turns: list[dict[str, Any]] = []
    for number, (role, items) in enumerate(record.turns):
        if role not in SPEAKERS or not items or (role == "system" and number):
            raise DataError(f"{where}: turn {number} of {role!r} needs content and a role of {', '.join(SPEAKERS)}")
        content: list[str | dict[str, str]] = []
        for item in items:
            if isinstance(item, bytes):
                images.append((_image_name(len(images), item, where), item))
                content.append({"image": images[-1][0]})
            else:
                content.append(item)
        turns.append({"role": role, "content": content})
    yield "json", _json({"version": FORMAT_VERSION, "source": record.source, "turns": turns, "meta": record.meta})
    yield from images


def _document_members(record: DocumentRecord, where: str) -> Iterator[tuple[str, bytes]]:
    names: list[str | None] = []
    images: list[tuple[str, bytes]] = []
    for place, (text, image) in enumerate(zip(record.texts, record.images, strict=True)):
        lost = place in record.missing
        if (text is not None) + (image is not None) + lost != 1:
            raise DataError(f"{where}: place {place} needs exactly one of a text, an image and a reason under missing")
        if image is not None:
            images.append((_image_name(len(images), image, where), image))
            names.append(images[-1][0])
        else:
            names.append("" if lost else None)
    yield "json", _json(_document_json(record, names))
    yield from images


def _image_name(number: int, data: bytes, where: str) -> str:
    return f"{number:03d}.{image_suffix(data, where)}"


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
