"""Any interleaved documents with local images, such as Wikipedia: one JSON object a line.

Either `{"texts": [...], "images": [...]}`, of equal length and at each place exactly one of them not null, or
`{"parts": [{"text": ...}, {"image": ...}, ...]}`. An image is a path. `id` and `meta` are optional.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from megatron_atum.data.converters.drafts import DocumentDraft, Dropped, ImageSource, LocalFile, Lost, Url
from megatron_atum.data.converters.obelics import places_fault
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.rows import JSONL, Row, read_rows

_URL = re.compile(r"(data):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


@dataclass(frozen=True)
class Documents:
    """`images` is the folder that paths are relative to; None stands for the folder of the file itself."""

    source: str = "documents"
    images: str | None = None
    require_image: bool = True
    suffixes: tuple[str, ...] = JSONL

    def read(self, part: Part) -> Iterator[DocumentDraft | Dropped]:
        folder = self.images or os.path.dirname(part.path) or "."
        for number, row in read_rows(part.path, ()):
            yield Dropped("bad_json") if row is None else self._draft(part.key(number), row, folder)

    def options(self) -> dict[str, Any]:
        kept = {"from": "documents", "source": self.source, "require-image": self.require_image}
        return kept | {"images": resolved(self.images)}

    def unfinished(self, part: Part) -> str | None:
        del part
        return None

    def _draft(self, key: str, row: Row, folder: str) -> DocumentDraft | Dropped:
        places: tuple[Any, Any] | None = row.get("texts"), row.get("images")
        if "parts" in row:
            places = _from_parts(row["parts"])
        if places is None:
            return Dropped("bad_parts")
        texts, paths = places
        fault = places_fault(texts, paths)
        if fault is not None:
            return Dropped(fault)
        images = [None if path is None else local_or_url(folder, path) for path in paths]
        return DocumentDraft(key, texts, images, self.source, _meta(row), self.require_image)


def _from_parts(parts: object) -> tuple[Any, Any] | None:
    """Texts and images by place; None if a part is not exactly one of both."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return None
    places = [(part.get("text"), part.get("image")) for part in parts]
    if any((text is None) == (image is None) for text, image in places):
        return None
    return [text for text, _ in places], [image for _, image in places]


def local_or_url(folder: str, path: str) -> ImageSource:
    """An image by its path below a folder, by its URL, or as it stands in a `data:` URL (RFC 2397)."""
    url = _URL.match(path)
    if url is None:
        return LocalFile(folder, path) if path else Lost("no_such_file")
    if url[1]:
        return _embedded(path)
    return Url(path) if url[2].lower() in ("http", "https") else Lost("unsupported_url")


def resolved(folder: str | None) -> str | None:
    """A folder of images as it is compared when a conversion goes on."""
    return None if folder is None else os.path.realpath(folder)


def _embedded(url: str) -> ImageSource:
    head, _, content = url.partition(",")
    if not head.lower().endswith(";base64"):
        return Lost("unsupported_url")
    try:
        return base64.b64decode("".join(unquote(content).split()), validate=True)
    except ValueError:
        return Lost("bad_url")


def _meta(row: Row) -> dict[str, Any]:
    meta = row.get("meta")
    given = meta if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
    return given if row.get("id") is None else {"id": row["id"], **given}
