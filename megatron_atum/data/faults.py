"""What was lost, and how much of it is too much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_atum.batch import NO_IMAGE, Batch
from megatron_atum.data.images import IMAGE_FAULTS
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.planner import Pack
from megatron_atum.errors import DataError

FEW = 1000  # a rate is taken of at least as many: the first broken image of a run must not end it
ACCEPTED = ("missing_shard",)  # by data.on_missing_shard=skip; otherwise it stops the run at once
MESSAGES = 5  # most broken images that are told of one by one in a step


class FaultCounts:
    """Samples dropped when shards were indexed, and images that turned out broken since the run began.

    The same on every rank, because it is fed with what all ranks have agreed on.
    """

    def __init__(self, indexes: Sequence[SourceIndex], max_rate: float) -> None:
        """Raises DataError: more of a source is broken than `max_rate` allows."""
        self._indexes, self._max_rate = indexes, max_rate
        self._images: dict[str, Counter[str]] = {
            index.name: Counter() for index in indexes
        }  # used and, by reason, lost
        for index in indexes:
            self._check(index.name, "samples", index.faults(), len(index), index.dropped())

    @property
    def total(self) -> int:
        """Samples that are broken, and broken images each time they came up."""
        return sum(index.faults() for index in self._indexes) + sum(map(_lost, self._images.values()))

    def add(self, packs: Sequence[Pack], codes: Tensor) -> list[str]:
        """Counts a step.

        Args:
            packs: of the step, in the order in which its images are numbered.
            codes: [images of the step] uint8, 0 or place in IMAGE_FAULTS + 1; the same on every rank.

        Returns:
            messages about the first images that were lost.
        """
        for pack in packs:
            self._images[self._indexes[pack.source].name]["used"] += pack.images
        if not codes.any():
            return []
        lost = [(*_owner(packs, int(n)), IMAGE_FAULTS[int(codes[n]) - 1]) for n in codes.nonzero()]
        for pack, _, reason in lost:
            self._images[self._indexes[pack.source].name][reason] += 1
        return [self._message(*one) for one in lost[:MESSAGES]]

    def check(self) -> None:
        """Raises DataError: more images of a source are broken than `max_rate` allows."""
        for name, counts in self._images.items():
            broken = {reason: count for reason, count in _reasons(counts).items() if reason not in ACCEPTED}
            self._check(name, "images", sum(broken.values()), counts["used"], broken)

    def report(self) -> dict[str, dict[str, int]]:
        """By source and reason."""
        return {index.name: index.dropped() | _reasons(self._images[index.name]) for index in self._indexes}

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {name: dict(sorted(counts.items())) for name, counts in self._images.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Counts of sources that are gone are left out."""
        self._images = {name: Counter(dict(state.get(name, {}))) for name in self._images}

    def _check(self, name: str, what: str, broken: int, of: int, reasons: Mapping[str, int]) -> None:
        if broken > self._max_rate * max(of, FEW):
            table = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            raise DataError(
                f"source {name}: {broken} of {of} {what} are broken ({table}), more than data.max_fault_rate="
                f"{self._max_rate}; see which with tools/data/validate.py, mend the shards, or raise the rate"
            )

    def _message(self, pack: Pack, number: int, reason: str) -> str:
        index = self._indexes[pack.source]
        shard, key = _where(index, pack, number)
        return f"{index.name}: {reason}: an image of {key} in {shard}; no token sees it"


def hide_images(batch: Batch, codes: Tensor) -> Batch:
    """No token sees an image with a code. Shapes and positions stay.

    Args:
        codes: [N] uint8, of the microbatch's images.
    """
    if not codes.any():
        return batch
    first_b = batch.images_per_row.cumsum(0) - batch.images_per_row  # number of each row's first image
    number_bS = (batch.image_index + first_b[:, None]).clamp(0, len(codes) - 1)
    broken_bS = (codes != 0)[number_bS] & (batch.image_index != NO_IMAGE)
    return replace(batch, image_index=torch.where(broken_bS, NO_IMAGE, batch.image_index))


def _lost(counts: Counter[str]) -> int:
    return sum(_reasons(counts).values())


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: counts[reason] for reason in sorted(counts) if reason != "used" and counts[reason]}


def _owner(packs: Sequence[Pack], number: int) -> tuple[Pack, int]:
    """The pack of an image of the step, and the image's number in it."""
    for pack in packs:
        if number < pack.images:
            return pack, number
        number -= pack.images
    raise AssertionError("an image beyond the step")


def _where(index: SourceIndex, pack: Pack, number: int) -> tuple[str, str]:
    """Shard and key of the sample that holds an image of a pack."""
    cuts: dict[int, Any] = {cut.place: cut for cut in pack.cuts}
    for place, sample in enumerate(pack.samples):
        shard, sidecar, row = index.sample(sample)
        positions = sidecar.image_positions(row)
        if place in cuts:
            positions = positions[(positions >= cuts[place].start) & (positions < cuts[place].stop)]
        if number < len(positions):
            return index.shards[shard].path, sidecar.key(row)
        number -= len(positions)
    raise AssertionError("an image beyond the pack")
