"""Whether the network was there while a part was made: an outage must not be written down as lost images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_atum.data.converters.drafts import ImageSource, Lost, Url
from megatron_atum.errors import DataError

LEAST = 20  # URLs asked for; of fewer, most may be gone by chance
_MAY_PASS = re.compile(r"dns|connection|timeout|http_(408|429|5\d\d)")


@dataclass
class Reach:
    """How many of a part's URLs were asked for, and which reasons that may pass were met."""

    asked: int = 0
    unreachable: Counter[str] = field(default_factory=Counter)

    def add(self, sources: Iterable[ImageSource], images: Iterable[bytes | Lost]) -> None:
        for source, image in zip(sources, images, strict=True):
            if isinstance(source, Url):
                self.asked += 1
                if isinstance(image, Lost) and _MAY_PASS.fullmatch(image.reason):
                    self.unreachable[image.reason] += 1

    def check(self, path: str, most: float) -> None:
        """Raises DataError when more than a share `most` was not reached."""
        lost = self.unreachable.total()
        if self.asked >= LEAST and lost > most * self.asked:
            reasons = ", ".join(f"{reason} {count}" for reason, count in self.unreachable.most_common())
            raise DataError(
                f"{path}: {lost} of {self.asked} images could not be reached ({reasons}); check the network and start "
                "again, or raise --max-unreachable"
            )
