"""What was lost, and how much of it is too much.

Legend: b rows of a microbatch, S tokens of a row, N images of the microbatch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from megatron_atum.batch import NO_IMAGE, Batch
from megatron_atum.data.flags import FAULTS
from megatron_atum.data.images import IMAGE_FAULTS
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.planner import Pack, images_of
from megatron_atum.errors import DataError

FEW = 1000  # a rate is taken of at least as many: the first broken image of a run must not end it
LATELY = 10_000  # images of a source after which counting begins anew, to see what goes wrong late in a run
BURST = 10  # times max_fault_rate that may be broken lately
MOST_MISSING = 0.5  # share of a source's images that on_missing_shard=skip puts up with, lately
MASKED = "masked_conversation"  # a consequence of lost images, and no fault of its own
MESSAGES = 5  # most broken images that are told of one by one in a step


class FaultCounts:
    """Samples dropped when shards were indexed, and images that turned out broken since the run began.

    The same on every rank, because it is fed with what all ranks have agreed on.
    """

    def __init__(self, indexes: Sequence[SourceIndex], max_rate: float) -> None:
        """Raises DataError: more of a source is broken than `max_rate` allows."""
        self._indexes, self._max_rate = indexes, max_rate
        # images used and, by reason, lost, and conversations masked: since the run began, and lately
        self._images: dict[str, Counter[str]] = {index.name: Counter() for index in indexes}
        self._lately: dict[str, Counter[str]] = {index.name: Counter() for index in indexes}
        for index in indexes:
            faults = {reason: count for reason, count in index.dropped.items() if reason in FAULTS}
            self._check(index.name, "samples", len(index), faults, max_rate)

    @property
    def total(self) -> int:
        """Samples that are broken, and broken images each time they came up."""
        return sum(index.faults for index in self._indexes) + sum(map(_lost, self._images.values()))

    def add(self, packs: Sequence[Pack], codes: Tensor) -> list[str]:
        """Counts a step.

        Args:
            packs: of the step, in the order in which its images are numbered.
            codes: [images of the step] uint8, 0 or place in IMAGE_FAULTS + 1; the same on every rank.

        Returns:
            messages about the first images that were lost.
        """
        for pack in packs:
            self._count(pack, "used", pack.images)
        if not codes.any():
            return []
        lost = [(*_owner(packs, int(n)), IMAGE_FAULTS[int(codes[n]) - 1]) for n in codes.nonzero()]
        for pack, _, reason in lost:
            self._count(pack, reason, 1)
        for pack in _masked(self._indexes, lost):
            self._count(pack, MASKED, 1)
        return [self._message(*one) for one in lost[:MESSAGES]]

    def check(self) -> None:
        """Raises DataError: more images of a source were lost than is allowed, since the run began or lately."""
        burst = min(1.0, BURST * self._max_rate)
        for name, counts in self._images.items():
            lately = self._lately[name]
            self._check(name, "images", counts["used"], _broken(counts), self._max_rate)
            self._check(name, "of the last images", lately["used"], _broken(lately), burst)
            missing = {"missing_shard": lately["missing_shard"]}
            self._check(name, "of the last images", lately["used"], missing, MOST_MISSING)
            if lately["used"] >= LATELY:
                lately.clear()

    def report(self) -> dict[str, dict[str, int]]:
        """By source and reason."""
        return {index.name: index.dropped | _set(self._images[index.name], but=("used",)) for index in self._indexes}

    def state_dict(self) -> dict[str, dict[str, dict[str, int]]]:
        return {
            name: {"all": dict(sorted(counts.items())), "lately": dict(sorted(self._lately[name].items()))}
            for name, counts in self._images.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, int]]]) -> None:
        """Counts of sources that are gone are left out."""
        self._images = {name: Counter(dict(state.get(name, {}).get("all", {}))) for name in self._images}
        self._lately = {name: Counter(dict(state.get(name, {}).get("lately", {}))) for name in self._images}

    def _count(self, pack: Pack, what: str, number: int) -> None:
        name = self._indexes[pack.source].name
        self._images[name][what] += number
        self._lately[name][what] += number

    def _check(self, name: str, what: str, of: int, reasons: Mapping[str, int], rate: float) -> None:
        broken = sum(reasons.values())
        if broken > rate * max(of, FEW):
            table = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
            raise DataError(
                f"source {name}: {broken} of {of} {what} are broken or missing ({table}), more than {rate:g} of "
                f"them (data.max_fault_rate={self._max_rate:g}); find them with tools/data/validate.py and mend them"
            )

    def _message(self, pack: Pack, number: int, reason: str) -> str:
        index = self._indexes[pack.source]
        shard, key = _where(index, pack, number)
        effect = "its conversation does not count in the loss" if index.kind == "conversations" else "no token sees it"
        return f"{index.name}: {reason}: an image of {key} in {shard}; {effect}"


def hide_images(batch: Batch, codes: Tensor, is_chat: Sequence[bool], eos_id: int) -> Batch:
    """No token sees an image with a code, and no label of its conversation counts: an answer about an image that
    nobody sees would be taught as an invention. Shapes and positions stay.

    Args:
        codes: [N] uint8, of the microbatch's images.
        is_chat: [b] whether a row holds conversations.
        eos_id: the token that ends each of them.
    """
    if not codes.any():
        return batch
    first_b = batch.images_per_row.cumsum(0) - batch.images_per_row  # number of each row's first image
    number_bS = (batch.image_index + first_b[:, None]).clamp(0, len(codes) - 1)
    broken_bS = (codes != 0)[number_bS] & (batch.image_index != NO_IMAGE)
    masked_bS = _whole_documents(batch.input_ids, broken_bS, eos_id) & torch.tensor(is_chat)[:, None]
    return replace(
        batch,
        image_index=torch.where(broken_bS, NO_IMAGE, batch.image_index),
        loss_mask=batch.loss_mask.masked_fill(torch.roll(masked_bS, shifts=-1, dims=-1), 0.0),  # position of a label
    )


def _whole_documents(ids_bS: Tensor, some_bS: Tensor, eos_id: int) -> Tensor:
    """[b,S] bool: all tokens of the documents that have any token of `some_bS`, their `</s>` included."""
    is_eos_bS = (ids_bS == eos_id).long()
    document_bS = is_eos_bS.cumsum(-1) - is_eos_bS
    hits_bS = torch.zeros_like(document_bS).scatter_add(-1, document_bS, some_bS.long())
    return hits_bS.gather(-1, document_bS) > 0


def _lost(counts: Mapping[str, int]) -> int:
    return sum(_reasons(counts).values())


def _broken(counts: Mapping[str, int]) -> dict[str, int]:
    """Without shards that are gone: those stop the run at once, or data.on_missing_shard=skip puts up with them."""
    return {reason: count for reason, count in _reasons(counts).items() if reason != "missing_shard"}


def _reasons(counts: Mapping[str, int]) -> dict[str, int]:
    return _set(counts, but=("used", MASKED))


def _set(counts: Mapping[str, int], but: tuple[str, ...]) -> dict[str, int]:
    return {what: counts[what] for what in sorted(counts) if what not in but and counts[what]}


def _masked(indexes: Sequence[SourceIndex], lost: Sequence[tuple[Pack, int, str]]) -> list[Pack]:
    """The pack of each conversation that lost an image, however many it lost."""
    found: dict[tuple[int, int], Pack] = {}
    for pack, number, _ in lost:
        index = indexes[pack.source]
        if index.kind == "conversations":
            # A conversation is shown from its beginning, so each begins with its image 0.
            numbers = [of_sample for *_, of_sample in islice(images_of(index, pack), number + 1)]
            found[pack.id, numbers.count(0)] = pack
    return list(found.values())


def _owner(packs: Sequence[Pack], number: int) -> tuple[Pack, int]:
    """The pack of an image of the step, and the image's number in it."""
    for pack in packs:
        if number < pack.images:
            return pack, number
        number -= pack.images
    raise AssertionError("an image beyond the step")


def _where(index: SourceIndex, pack: Pack, number: int) -> tuple[str, str]:
    """Shard and key of the sample that holds an image of a pack."""
    shard, row, _ = next(islice(images_of(index, pack), number, None))
    return index.shards[shard].path, index.sidecar(shard).key(row)
