"""How many samples and images were kept and dropped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IN_DROPPED_SAMPLE = "in_dropped_sample"  # an image that was had, in a sample that is not kept for another reason


@dataclass
class Counts:
    """Everything that was read is either kept or dropped; the images of malformed samples are not read."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    images_kept: int = 0
    images_lost: Counter[str] = field(default_factory=Counter)

    def add(self, other: Counts) -> None:
        self.kept += other.kept
        self.dropped += other.dropped
        self.images_kept += other.images_kept
        self.images_lost += other.images_lost

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": _json(self.kept, self.dropped, "dropped"),
            "images": _json(self.images_kept, self.images_lost, "lost"),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Counts:
        samples, images = value["samples"], value["images"]
        return Counts(samples["kept"], Counter(samples["dropped"]), images["kept"], Counter(images["lost"]))

    def table(self) -> str:
        """For people: two blocks of lines."""
        return "\n".join(
            _lines("samples", self.kept, "dropped", self.dropped)
            + _lines("images", self.images_kept, "lost", self.images_lost)
        )


def _json(kept: int, lost: Counter[str], word: str) -> dict[str, Any]:
    return {"read": kept + lost.total(), "kept": kept, word: dict(sorted(lost.items()))}


def _lines(what: str, kept: int, word: str, lost: Counter[str]) -> list[str]:
    lines = [f"{what:8} read {kept + lost.total():,}   kept {kept:,}   {word} {lost.total():,}"]
    return lines + [f"  {reason:24} {count:>12,}" for reason, count in lost.most_common()]
