"""What a source gives: samples whose images are still to be had, and how they become records of a shard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_atum.data.converters.fetch import Fetcher, read_inside
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.converters.reencode import ImageProblem
from megatron_atum.data.shards import ConversationRecord, DocumentRecord, PairRecord


@dataclass(frozen=True)
class Url:
    url: str


@dataclass(frozen=True)
class LocalFile:
    """A file that must lie below `folder`."""

    folder: str
    path: str


@dataclass(frozen=True)
class Lost:
    """An image that is known to be lost before anyone looks for it."""

    reason: str


ImageSource = Url | LocalFile | bytes | Lost


@dataclass(frozen=True)
class Dropped:
    """`samples` samples that are not kept, for the same reason."""

    reason: str
    samples: int = 1


@dataclass
class DocumentDraft:
    """At each place exactly one of text and image is not None."""

    key: str
    texts: list[str | None]
    images: list[ImageSource | None]
    source: str
    meta: dict[str, Any] = field(default_factory=dict)
    require_image: bool = True

    def sources(self) -> list[ImageSource]:
        return [image for image in self.images if image is not None]

    def finish(self, images: list[bytes | Lost]) -> DocumentRecord | Dropped:
        """A record in which a lost image keeps its place."""
        found = iter(images)
        placed = [None if image is None else next(found) for image in self.images]
        if self.require_image and not any(isinstance(image, bytes) for image in images):
            return Dropped("all_images_lost" if images else "no_image")
        record = DocumentRecord(
            self.key,
            self.texts,
            [image if isinstance(image, bytes) else None for image in placed],
            self.source,
            {place: image.reason for place, image in enumerate(placed) if isinstance(image, Lost)},
            self.meta,
        )
        return record if _writable(self.texts, self.meta) else Dropped("bad_unicode")


@dataclass
class PairDraft:
    key: str
    image: ImageSource
    text: str
    meta: dict[str, Any] | None = None

    def sources(self) -> list[ImageSource]:
        return [self.image]

    def finish(self, images: list[bytes | Lost]) -> PairRecord | Dropped:
        (image,) = images
        if isinstance(image, Lost):
            return Dropped(image.reason)
        if not _writable(self.text, self.meta):
            return Dropped("bad_unicode")
        return PairRecord(self.key, image, self.text, self.meta)


@dataclass
class ConversationDraft:
    """An image that is lost takes its conversation with it: what is said about it would be invented."""

    key: str
    turns: list[tuple[str, list[str | ImageSource]]]  # role, then texts and images in their order
    source: str
    meta: dict[str, Any] = field(default_factory=dict)

    def sources(self) -> list[ImageSource]:
        return [item for _, content in self.turns for item in content if not isinstance(item, str)]

    def finish(self, images: list[bytes | Lost]) -> ConversationRecord | Dropped:
        for image in images:
            if isinstance(image, Lost):
                return Dropped(image.reason)
        found = iter(image for image in images if isinstance(image, bytes))
        turns: list[tuple[str, list[str | bytes]]] = [
            (role, [item if isinstance(item, str) else next(found) for item in content]) for role, content in self.turns
        ]
        texts = [item for _, content in self.turns for item in content if isinstance(item, str)]
        if not _writable(texts, self.meta):
            return Dropped("bad_unicode")
        return ConversationRecord(self.key, turns, self.source, self.meta)


Draft = DocumentDraft | PairDraft | ConversationDraft


class Source(Protocol):
    """One published form of data. Sent to other processes, so it holds nothing but settings."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the names of its files."""
        ...

    def read(self, part: Part) -> Iterator[Draft | Dropped]:
        """Samples of a file in order. Raises DataError when the file cannot be read."""
        ...

    def options(self) -> dict[str, Any]:
        """The settings that the result depends on, by their names on the command line."""
        ...

    def unfinished(self, part: Part) -> str | None:
        """Why a file is not to be converted yet; None if it is."""
        ...


def found_bytes(source: ImageSource, fetcher: Fetcher | None, max_bytes: int) -> bytes:
    """The file as it was found. Raises ImageProblem."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, LocalFile):
        return read_inside(source.folder, source.path, max_bytes)
    if isinstance(source, Lost):
        raise ImageProblem(source.reason)
    if fetcher is None:
        raise ImageProblem("no_fetcher")
    return fetcher.fetch(source.url)


def scalars(meta: dict[str, Any]) -> dict[str, Any]:
    """The part of a row's metadata that is worth its place in a shard: plain values that are set."""
    return {str(name): value for name, value in meta.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    """Python reads and writes NaN and Infinity, but they are no JSON."""
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, str | int)


def _writable(*values: Any) -> bool:
    """Whether all texts can be written as UTF-8. JSON can hold half a surrogate pair, UTF-8 cannot."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
