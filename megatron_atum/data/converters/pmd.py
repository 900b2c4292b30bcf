"""PMD as published (parquet) or as `datasets` keeps it (Arrow): a caption, and an image or its URL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.converters.drafts import Dropped, ImageSource, PairDraft, Url
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.rows import ROW_SUFFIXES, Row, read_rows

COLUMNS = ("image", "text")
OPTIONAL = ("image_url", "source", "meta")


@dataclass(frozen=True)
class Pmd:
    """`exclude` holds names of the column `source`; `fetches` says that there is something to fetch URLs with."""

    exclude: tuple[str, ...] = ()
    fetches: bool = False
    suffixes: tuple[str, ...] = ROW_SUFFIXES

    def read(self, part: Part) -> Iterator[PairDraft | Dropped]:
        for number, row in read_rows(part.path, COLUMNS, OPTIONAL):
            yield Dropped("bad_json") if row is None else self._draft(part.key(number), row)

    def options(self) -> dict[str, Any]:
        return {"from": "pmd", "exclude": sorted(self.exclude)}

    def unfinished(self, part: Part) -> str | None:
        del part
        return None

    def _draft(self, key: str, row: Row) -> PairDraft | Dropped:
        if row.get("source") in self.exclude:
            return Dropped("excluded_source")
        text = row.get("text")
        if not isinstance(text, str) or not text.strip():
            return Dropped("no_text")
        image = self._image(row)
        return Dropped("no_image") if image is None else PairDraft(key, image, text, _meta(row))

    def _image(self, row: Row) -> ImageSource | None:
        image = row.get("image")
        # A path without bytes is one of the machine that made the file.
        content = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(content, bytes) and content:
            return content
        url = row.get("image_url")
        return Url(url) if self.fetches and isinstance(url, str) and url else None


def _meta(row: Row) -> dict[str, Any]:
    meta = {name: row[name] for name in ("source", "image_url") if isinstance(row.get(name), str)}
    if row.get("meta"):
        try:
            meta["meta"] = json.loads(row["meta"])
        except (ValueError, TypeError, RecursionError):
            meta["meta"] = str(row["meta"])  # nobody reads it, so it is no reason to drop a pair
    return meta
