"""Your own data: JSON objects with images by their path, by URL, or in the text itself."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from megatron_atum.data.converters.drafts import Draft, Dropped, ImageSource, LocalFile, Lost, Url
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.rows import Row, read_rows

_URL = re.compile(r"(data):|([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


@dataclass(frozen=True)
class LocalRows:
    """A Source, but for what one object means (`_draft`).

    `images` is the folder that paths are relative to; None stands for the folder of the file itself.
    """

    source: str
    images: str | None = None

    def read(self, part: Part) -> Iterator[Draft | Dropped]:
        folder = self.images or os.path.dirname(part.path) or "."
        for number, row in read_rows(part.path, ()):
            yield Dropped("bad_json") if row is None else self._draft(part.key(number), row, folder)

    def options(self) -> dict[str, Any]:
        # resolved, as it is compared when a conversion goes on
        images = None if self.images is None else os.path.realpath(self.images)
        return {"source": self.source, "images": images}

    def unfinished(self, part: Part) -> str | None:
        del part
        return None

    def _draft(self, key: str, row: Row, folder: str) -> Draft | Dropped:
        raise NotImplementedError


def local_or_url(folder: str, path: str) -> ImageSource:
    """An image by its path below a folder, by its URL, or as it stands in a `data:` URL (RFC 2397)."""
    url = _URL.match(path)
    if url is None:
        return LocalFile(folder, path) if path else Lost("no_such_file")
    if url[1]:
        return _embedded(path)
    return Url(path) if url[2].lower() in ("http", "https") else Lost("unsupported_url")


def _embedded(url: str) -> ImageSource:
    head, _, content = url.partition(",")
    if not head.lower().endswith(";base64"):
        return Lost("unsupported_url")
    try:
        return base64.b64decode("".join(unquote(content).split()), validate=True)
    except ValueError:
        return Lost("bad_url")
