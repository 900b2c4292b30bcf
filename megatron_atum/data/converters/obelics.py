"""OBELICS as published: parquet whose rows hold a web page's texts and the URLs of its images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.converters.drafts import DocumentDraft, Dropped, Lost, Url, scalars
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.rows import ROW_SUFFIXES, Row, read_rows

COLUMNS = ("images", "texts", "metadata", "general_metadata")


@dataclass(frozen=True)
class Obelics:
    source: str = "obelics"
    require_image: bool = True
    suffixes: tuple[str, ...] = ROW_SUFFIXES

    def read(self, part: Part) -> Iterator[DocumentDraft | Dropped]:
        for number, row in read_rows(part.path, COLUMNS):
            yield Dropped("bad_json") if row is None else self._draft(part.key(number), row)

    def options(self) -> dict[str, Any]:
        return {"from": "obelics", "source": self.source, "require-image": self.require_image}

    def unfinished(self, part: Part) -> str | None:
        del part
        return None

    def _draft(self, key: str, row: Row) -> DocumentDraft | Dropped:
        fault = places_fault(row.get("texts"), row.get("images"))
        if fault is not None:
            return Dropped(fault)
        texts, urls = row["texts"], row["images"]
        try:
            page, places = json.loads(row["general_metadata"]), json.loads(row["metadata"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return Dropped("bad_json")
        if not isinstance(page, dict) or not isinstance(places, list):
            return Dropped("bad_json")
        if len(places) != len(texts):
            return Dropped("unequal_lengths")
        images = [None if url is None else Url(url) if url else Lost("bad_url") for url in urls]
        where = {str(place): url for place, url in enumerate(urls) if url is not None}
        return DocumentDraft(
            key, texts, [*images], self.source, {**scalars(page), "image_urls": where}, self.require_image
        )


def places_fault(texts: object, images: object) -> str | None:
    """Why two lists are not the places of a document: at each exactly one of them holds a text. None if they are."""
    if not isinstance(texts, list) or not isinstance(images, list):
        return "not_lists"
    if len(texts) != len(images):
        return "unequal_lengths"
    if not all(value is None or isinstance(value, str) for value in (*texts, *images)):
        return "not_texts"
    pairs = list(zip(texts, images, strict=True))
    if any(text is not None and image is not None for text, image in pairs):
        return "both_set"
    return "none_set" if any(text is None and image is None for text, image in pairs) else None
