"""Keys that occur in several shards of a data set.

Keys are compared by a hash of 64 bits, so that a billion of them need no more memory than `MOST_HASHES`; those that
are reported have been compared in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.flags import FAULT_MASK
from megatron_atum.data.processes import in_processes
from megatron_atum.data.sidecar import Sidecar, read_sidecar, sidecar_path
from megatron_atum.data.storage import Storage

MOST_HASHES = 1 << 28  # held at a time, 2 GiB; with more keys, all are read again for each part of them
MOST_LISTED = 10_000  # doubled keys that are named
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9)


@dataclass(frozen=True)
class Doubled:
    """A key and the shards, two or more, that hold it."""

    key: str
    shards: list[str]


@dataclass
class DoubledKeys:
    listed: list[Doubled] = field(default_factory=list)  # by key, at most MOST_LISTED
    count: int = 0


def find_doubled_keys(shards: Sequence[str], samples: int, workers: int) -> DoubledKeys:
    """Keys that more than one shard has. Samples with a fault do not count.

    Args:
        shards: paths; all have a sidecar.
        samples: in all of them.

    Raises:
        DataError: a sidecar is missing or damaged.
    """
    parts = -(-samples // MOST_HASHES)
    found = [_repeated(shards, part, parts, workers) for part in range(parts)]
    hashes = np.concatenate([*found, np.zeros(0, np.uint64)])
    if not len(hashes):
        return DoubledKeys()
    listed = sorted(_confirmed(shards, hashes[:MOST_LISTED], workers), key=lambda one: one.key)
    missed = min(len(hashes), MOST_LISTED) - len({one.key for one in listed})  # other keys with the same hash
    return DoubledKeys(listed, len(hashes) - missed)


def key_hashes(sidecar: Sidecar) -> NDArray[np.uint64]:
    """[n] of the keys of all samples."""
    first, keys = sidecar.arrays["first_key"].astype(np.int64), sidecar.arrays["keys"]
    lengths = np.diff(first)
    hashes = np.zeros(len(lengths), np.uint64)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        words = np.zeros((len(rows), -(-int(length) // 8) * 8), np.uint8)
        words[:, :length] = keys[first[rows, None] + np.arange(length)]
        hashes[rows] = _mix(words.view(np.uint64), int(length))
    return hashes


def _mix(words: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """[n] from [n, words]"""
    one, other = map(np.uint64, _MULTIPLIERS)
    mixed = np.full(len(words), length, np.uint64)
    for word in words.T:
        mixed = (mixed ^ word) * one
        mixed = (mixed ^ (mixed >> np.uint64(32))) * other
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _repeated(shards: Sequence[str], part: int, parts: int, workers: int) -> NDArray[np.uint64]:
    """Sorted hashes that occur more than once, of one of several ranges of hashes."""
    found = [hashes for _, hashes in in_processes(_Hashes(part, parts), shards, workers)]
    hashes = np.concatenate(found)
    del found
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _confirmed(shards: Sequence[str], hashes: NDArray[np.uint64], workers: int) -> Iterator[Doubled]:
    places: dict[str, list[str]] = {}
    for shard, keys in in_processes(_Keys(hashes), shards, workers):
        for key in keys:
            places.setdefault(key, []).append(shard)
    return (Doubled(key, sorted(where)) for key, where in places.items() if len(where) > 1)


@dataclass
class _Hashes:
    part: int
    parts: int
    storage: Storage = field(default_factory=Storage)

    def __call__(self, shard: str) -> NDArray[np.uint64]:
        hashes = _sound_hashes(read_sidecar(sidecar_path(shard), self.storage))[1]
        return hashes[hashes % np.uint64(self.parts) == np.uint64(self.part)]


@dataclass
class _Keys:
    hashes: NDArray[np.uint64]
    storage: Storage = field(default_factory=Storage)

    def __call__(self, shard: str) -> list[str]:
        sidecar = read_sidecar(sidecar_path(shard), self.storage)
        rows, hashes = _sound_hashes(sidecar)
        return [sidecar.key(int(row)) for row in rows[np.isin(hashes, self.hashes)]]


def _sound_hashes(sidecar: Sidecar) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Rows of the samples without a fault, and the hashes of their keys: within a shard they are unique."""
    rows = np.flatnonzero((sidecar.flags & np.uint16(FAULT_MASK)) == 0)
    return rows, key_hashes(sidecar)[rows]
