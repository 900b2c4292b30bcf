"""Conversations of images and turns: one JSON object a line, or a list of them.

Turns stand under `conversations` (LLaVA: `{"from": "human", "value": ...}`), `messages` (`{"role": "user", "content":
...}`) or `data` (UltraChat: texts of user and assistant in turn). Images stand where the texts say `<image>`, or where
a content list has them; paths come from `image` or `images` of the record, or from the content itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.converters.drafts import ConversationDraft, Dropped, ImageSource, scalars
from megatron_atum.data.converters.local import LocalRows, local_or_url
from megatron_atum.data.converters.rows import JSON, JSONL, Row

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
PLACEHOLDER = "<image>"


class BadRecord(Exception):
    """A record that is no conversation. `reason` is the word it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class NextImage:
    """A place for the next image of the record."""


Item = str | NextImage | ImageSource
Turns = list[tuple[str, list[Item]]]


@dataclass(frozen=True)
class Conversations(LocalRows):
    source: str = "conversations"
    suffixes: tuple[str, ...] = JSONL + JSON

    def options(self) -> dict[str, Any]:
        return {"from": "conversations", **super().options()}

    def _draft(self, key: str, row: Row, folder: str) -> ConversationDraft | Dropped:
        try:
            turns = [(role, list(_items(content, folder))) for role, content in _turns(row)]
            placed = _placed(turns, _images(row, folder))
            _check_turns(placed)
        except BadRecord as bad:
            return Dropped(bad.reason)
        return ConversationDraft(key, placed, self.source, scalars({"id": row.get("id")}))


def _turns(row: Row) -> list[tuple[str, Any]]:
    """Role and content of each turn."""
    given = _first(row, "conversations", "messages")
    if given is None and isinstance(row.get("data"), list):
        return [("assistant" if number % 2 else "user", text) for number, text in enumerate(row["data"])]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise BadRecord("no_turns")
    turns = []
    for turn in given:
        role = _first(turn, "from", "role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord("unknown_role")
        turns.append((ROLES[role], _first(turn, "value", "content")))
    return turns


def _first(row: Row, *names: str) -> Any:
    """The first value that is set. Tables written as JSON spell what a row lacks as null."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def _items(content: Any, folder: str) -> Iterator[Item]:
    """Texts, without white space at their ends, and images of a turn."""
    if isinstance(content, str):
        texts = content.split(PLACEHOLDER)
        for number, text in enumerate(texts):
            if text.strip():
                yield text.strip()
            if number + 1 < len(texts):
                yield NextImage()
    elif isinstance(content, list) and all(isinstance(item, dict) for item in content):
        for item in content:
            yield from _typed_item(item, folder)
    else:
        raise BadRecord("bad_content")


def _typed_item(item: Row, folder: str) -> Iterator[Item]:
    """`{"type": "text", "text": ...}`, or an image: `image`, `url`, `path` or `image_url` says which, else the next."""
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        yield from _items(item["text"], folder)
        return
    if kind not in ("image", "image_url"):
        raise BadRecord("bad_content")
    found = _first(item, "image", "url", "path", "image_url")
    if isinstance(found, dict):  # {"image_url": {"url": ...}}
        found = found.get("url")
    if found is None:
        yield NextImage()
    elif isinstance(found, str):
        yield local_or_url(folder, found)
    else:
        raise BadRecord("bad_content")


def _check_turns(turns: list[tuple[str, list[str | ImageSource]]]) -> None:
    roles = [role for role, _ in turns]
    if not roles:
        raise BadRecord("no_turns")
    if "system" in roles[1:]:
        raise BadRecord("system_not_first")
    if any(not items for _, items in turns):
        raise BadRecord("empty_turn")
    if "assistant" not in roles:
        raise BadRecord("no_answer")


def _images(row: Row, folder: str) -> list[ImageSource]:
    given = row.get("images") or row.get("image") or []
    paths = given if isinstance(given, list) else [given]
    paths = [path.get("path") if isinstance(path, dict) else path for path in paths]
    if not all(isinstance(path, str) for path in paths):
        raise BadRecord("bad_images")
    return [local_or_url(folder, path) for path in paths]


def _placed(turns: Turns, images: list[ImageSource]) -> list[tuple[str, list[str | ImageSource]]]:
    """Every image at its place. Images without any place stand in front of what the user says first, as in LLaVA."""
    places = sum(isinstance(item, NextImage) for _, items in turns for item in items)
    users = [items for role, items in turns if role == "user"]
    if images and not places and users:
        users[0][:0] = images
    elif places != len(images):
        raise BadRecord("image_count_mismatch")
    left = iter(images)
    return [(role, [next(left) if isinstance(item, NextImage) else item for item in items]) for role, items in turns]
