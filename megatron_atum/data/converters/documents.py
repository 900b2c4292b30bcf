"""Any interleaved documents with local images, such as Wikipedia: one JSON object a line.

Either `{"texts": [...], "images": [...]}`, of equal length and at each place exactly one of them not null, or
`{"parts": [{"text": ...}, {"image": ...}, ...]}`. An image is a path. `id` and `meta` are optional.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.converters.drafts import DocumentDraft, Dropped, ImageSource, LocalFile, Lost, Url
from megatron_atum.data.converters.obelics import places_fault
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.rows import JSONL, Row, read_rows


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
        return {"from": "documents", "source": self.source, "require-image": self.require_image}

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
    """An image by its path below a folder, or by its URL."""
    if path.startswith(("http://", "https://")):
        return Url(path)
    return LocalFile(folder, path) if path else Lost("no_such_file")


def _meta(row: Row) -> dict[str, Any]:
    meta = row.get("meta")
    given = meta if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
    return given if row.get("id") is None else {"id": row["id"], **given}
