"""Any interleaved documents with local images, such as Wikipedia: one JSON object a line.

Either `{"texts": [...], "images": [...]}`, of equal length and at each place exactly one of them not null, or
`{"parts": [{"text": ...}, {"image": ...}, ...]}`. An image is a path. `id` and `meta` are optional.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_atum.data.converters.drafts import DocumentDraft, Dropped
from megatron_atum.data.converters.local import LocalRows, local_or_url
from megatron_atum.data.converters.obelics import places_fault
from megatron_atum.data.converters.rows import JSONL, Row


@dataclass(frozen=True)
class Documents(LocalRows):
    source: str = "documents"
    require_image: bool = True
    suffixes: tuple[str, ...] = JSONL

    def options(self) -> dict[str, Any]:
        return {"from": "documents", **super().options(), "require-image": self.require_image}

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


def _meta(row: Row) -> dict[str, Any]:
    meta = row.get("meta")
    given = meta if isinstance(meta, dict) else {} if meta is None else {"meta": meta}
    return given if row.get("id") is None else {"id": row["id"], **given}
