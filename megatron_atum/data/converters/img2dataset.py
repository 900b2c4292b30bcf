"""Tars as img2dataset writes them, for example of LAION: KEY.jpg, KEY.txt, KEY.json."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_atum.data.converters.drafts import Dropped, PairDraft
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.scan import BLOCK, IMAGE_SUFFIXES
from megatron_atum.errors import DataError

SAMPLE_DIGITS = 4  # of img2dataset's keys with the usual 10,000 samples a tar
MAX_MEMBER = 256 * 2**20  # bytes; a larger one is no image, caption or json
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# Of the image as img2dataset stored it, or said elsewhere.
_NOT_KEPT = ("key", "status", "error_message", "exif", "caption", "width", "height")


@dataclass(frozen=True)
class Img2dataset:
    """`incomplete` says what to do with tars without NNNNN_stats.json, which img2dataset writes last."""

    incomplete: Literal["skip", "use"] = "skip"
    suffixes: tuple[str, ...] = (".tar",)

    def read(self, part: Part) -> Iterator[PairDraft | Dropped]:
        reader, written, keys = _TarSamples(part.path), 0, set[str]()
        for name, members in reader:
            written += 1
            yield _draft(part, name, members, keys)
        stats = _read_stats(part.path)
        if reader.cut:
            # Without stats nobody knows how many there were; the one that was cut is certain.
            yield Dropped("truncated_tar", max(1, stats.get("successes", 0) - written))
        if stats.get("count", 0) > stats.get("successes", 0):
            yield Dropped("img2dataset_failed", stats["count"] - stats["successes"])

    def options(self) -> dict[str, Any]:
        return {"from": "img2dataset"}  # --incomplete says which tars are read, not what is made of one

    def unfinished(self, part: Part) -> str | None:
        if self.incomplete == "use" or os.path.exists(_stats_path(part.path)):
            return None
        return f"no {os.path.basename(_stats_path(part.path))}: img2dataset has not finished it"


@dataclass
class _TarSamples:
    """(name, {suffix: content}) of the samples of a tar that are there to their last byte.

    `cut` is set when the tar ends too early or is damaged: tarfile itself ends quietly at both.
    """

    path: str
    cut: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        name, members = "", dict[str, bytes]()
        for stem, suffix, content in self._members():
            if stem != name and members:
                yield name, members
                members = {}
            name = stem
            members[suffix] = content
        if members and not self.cut:
            yield name, members

    def _members(self) -> Iterator[tuple[str, str, bytes]]:
        end = 0
        try:
            with open(self.path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                    if info.isfile() and info.size <= MAX_MEMBER:
                        stream.seek(info.offset_data)
                        # Where the tar ends within it, tarfile raises next, and its sample is not given.
                        yield *_split(info.name), stream.read(info.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header in memory
                stream.seek(end)
                self.cut = stream.read(BLOCK) != bytes(BLOCK)
        except (tarfile.TarError, OSError) as error:
            if not end:
                raise DataError(f"{self.path} is no uncompressed tar ({error}); copy or download it again") from error
            self.cut = True


def _split(name: str) -> tuple[str, str]:
    folder, base = os.path.split(name)
    stem, _, suffix = base.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def _draft(part: Part, name: str, members: dict[str, bytes], keys: set[str]) -> PairDraft | Dropped:
    key = os.path.basename(name)
    if not _KEY.fullmatch(key):
        return Dropped("bad_key")
    if key in keys:
        return Dropped("duplicate_key")
    keys.add(key)
    images = [suffix for suffix in members if suffix in IMAGE_SUFFIXES]
    if len(images) != 1:
        return Dropped("several_images" if images else "no_image")
    facts = _facts(members.get("json", b"{}"))
    if facts is None:
        return Dropped("bad_json")
    if "json" in members and facts.get("status", "success") != "success":
        return Dropped("status_not_success")
    caption = _caption(members, facts)
    if isinstance(caption, Dropped):
        return caption
    meta = {fact: value for fact, value in facts.items() if fact not in _NOT_KEPT and value is not None}
    return PairDraft(_unique(part.name, key), members[images[0]], caption, meta or None)


def _unique(part: str, key: str) -> str:
    """A key that no other part can have: img2dataset's own where it is the name of the part and four more digits.

    Otherwise PART+KEY, since neither a part's name nor a key has a plus.
    """
    return key if key[:-SAMPLE_DIGITS] == part else f"{part}+{key}"


def _caption(members: dict[str, bytes], facts: dict[str, Any]) -> str | Dropped:
    try:
        text = members["txt"].decode() if "txt" in members else facts.get("caption")
    except UnicodeDecodeError:
        return Dropped("bad_unicode")
    return text if isinstance(text, str) and text.strip() else Dropped("no_text")


def _facts(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _stats_path(tar: str) -> str:
    return tar.removesuffix(".tar") + "_stats.json"


def _read_stats(tar: str) -> dict[str, int]:
    """Numbers of rows and of successes; {} if they are not known."""
    try:
        with open(_stats_path(tar), "rb") as stream:
            facts = _facts(stream.read()) or {}
    except OSError:
        return {}
    return {name: facts[name] for name in ("count", "successes") if isinstance(facts.get(name), int)}
