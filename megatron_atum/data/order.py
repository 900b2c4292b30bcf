"""The order in which an epoch of a source is read: shards in random order, and samples shuffled over many shards.

Only the shards of one group are in use at a time, so nothing as long as the source is ever held, and reading stays
within few files. Everything is a pure function of (index, seed, epoch).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.pieces import whole_turns
from megatron_atum.data.rng import Random

SHORTENED = "shortened"  # conversations that lose turns at their end; the others of `dropped` are lost as a whole
SMALL = 2048  # usable samples; a source with fewer is packed several passes at a time


@dataclass(frozen=True)
class Group:
    """Usable samples of some shards, shuffled; those of a small source several times over. n samples."""

    samples: NDArray[np.int64]  # [n] numbers within the source
    tokens: NDArray[np.int64]  # [n]
    images: NDArray[np.int64]  # [n]
    dropped: dict[str, int]  # reason -> samples that no row of this run can hold; SHORTENED: only in part


class Epoch:
    """One pass over a source, or `passes` of them over a small one: it could not fill rows otherwise."""

    def __init__(self, index: SourceIndex, seed: int, number: int, group_samples: int) -> None:
        """Args: group_samples: samples that are shuffled together; whole shards, so they may be more."""
        self._index, self._seed, self.number = index, seed, number
        self.passes = -(-SMALL // index.usable) if index.usable < SMALL else 1
        order = Random(seed, "shards", index.name, number).permutation(len(index.shards))
        sizes = np.diff(index.first_sample)[order]
        group_of = (np.cumsum(sizes) - sizes) // group_samples
        self._groups = np.split(order, np.flatnonzero(np.diff(group_of)) + 1)

    def __len__(self) -> int:
        """Groups."""
        return len(self._groups)

    def group(self, number: int, row_tokens: int) -> Group:
        """Raises DataError when a sidecar cannot be used."""
        index = self._index
        parts = [_usable(index, int(shard)) for shard in self._groups[number]]
        samples, tokens, images = (np.concatenate([part[place] for part in parts]) for place in range(3))
        too_long, too_many = tokens > row_tokens, images > index.max_images
        shortened = 0
        if index.kind == "documents":  # they are cut instead
            too_long, too_many = np.zeros_like(too_long), np.zeros_like(too_many)
        elif index.kind == "conversations":
            too_large = too_long | too_many
            too_long, too_many = _without_answer(index, samples, too_large, row_tokens)
            shortened = int((too_large & ~(too_long | too_many)).sum())
        fits = ~(too_long | too_many)
        dropped = {"too_long": int(too_long.sum()), "too_many_images": int((too_many & ~too_long).sum())}
        dropped[SHORTENED] = shortened
        samples, tokens, images = samples[fits], tokens[fits], images[fits]
        random = Random(self._seed, "samples", index.name, self.number, number)
        order = np.concatenate([random.permutation(len(samples)) for _ in range(self.passes)])
        left_out = {reason: count * self.passes for reason, count in dropped.items() if count}
        return Group(samples[order], tokens[order], images[order], left_out)


def _without_answer(
    index: SourceIndex, samples: NDArray[np.int64], too_large: NDArray[np.bool_], row_tokens: int
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which conversations have no whole answer that fits a row: for want of tokens, of images."""
    too_long, too_many = np.zeros_like(too_large), np.zeros_like(too_large)
    for n in np.flatnonzero(too_large).tolist():
        _, sidecar, row = index.sample(int(samples[n]))
        _, reason = whole_turns(*sidecar.turns(row), sidecar.image_positions(row), row_tokens, index.max_images)
        too_long[n], too_many[n] = reason == "too_long", reason == "too_many_images"
    return too_long, too_many


def _usable(index: SourceIndex, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Numbers, tokens and images of a shard's samples that no flag drops."""
    sidecar = index.sidecar(shard)
    rows = np.flatnonzero((sidecar.flags & np.uint16(index.drop_mask)) == 0)
    return index.first_sample[shard] + rows, sidecar.tokens[rows], sidecar.images[rows]
