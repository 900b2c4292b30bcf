"""Which samples go into which pack: a pure function of (index, mixture, seed, number of the pack).

A pack is one row of a batch. Its source is the one that is furthest behind its share of tokens; its samples are the
next ones of that source's shuffled epoch, as many as fit. Samples are never cut.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.rng import Random
from megatron_atum.errors import DataError

STATE_VERSION = 1


@dataclass(frozen=True)
class Pack:
    """One row: `samples` are sample numbers of the index of source number `source`."""

    id: int  # global number in the stream, from 0
    source: int
    samples: tuple[int, ...]


@dataclass
class _Cursor:
    """How far a source has been read."""

    epoch: int = 0
    position: int = 0  # in the permutation of the epoch
    tokens: int = 0  # handed out so far


class Planner:
    """The stream of packs."""

    def __init__(
        self, indexes: Sequence[SourceIndex], weights: Mapping[str, float], sequence_length: int, seed: int
    ) -> None:
        """Args: indexes: one per source; weights: share of tokens by source name, on any scale.

        Raises:
            DataError: no source, two of one name, a negative weight or no positive one.
        """
        self.indexes = list(indexes)
        self.sequence_length = sequence_length
        self.seed = seed
        self._weights = _normalised_weights(self.indexes, weights)
        self._cursors = [_Cursor() for _ in self.indexes]
        self._packs = 0
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}  # source -> epoch and its permutation
        self.hash = self._hash()

    def next(self) -> Pack:
        """The next pack of the stream."""
        source = self._furthest_behind()
        index, cursor = self.indexes[source], self._cursors[source]
        samples: list[int] = []
        tokens = images = 0
        while True:
            sample = self._peek(source)
            sample_tokens, sample_images = int(index.tokens[sample]), int(index.images[sample])
            full = tokens + sample_tokens > self.sequence_length or images + sample_images > index.max_images
            if full and samples:
                break  # the sample stays in its place and opens the next pack of this source
            samples.append(sample)
            tokens, images = tokens + sample_tokens, images + sample_images
            cursor.position += 1
        cursor.tokens += tokens
        self._packs += 1
        return Pack(self._packs - 1, source, tuple(samples))

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: small, global, and writable as JSON."""
        sources = {
            index.name: [cursor.epoch, cursor.position, cursor.tokens]
            for index, cursor in zip(self.indexes, self._cursors, strict=True)
        }
        return {"version": STATE_VERSION, "hash": self.hash, "packs": self._packs, "sources": sources}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a position of this same stream. Raises DataError when the state belongs to another stream."""
        if not isinstance(state, Mapping):
            raise DataError(f"data state cannot be used: it is {state!r:.40}; start a new run")
        if state.get("version") != STATE_VERSION:
            raise DataError(f"data state has version {state.get('version')!r}, not {STATE_VERSION}; start a new run")
        if state.get("hash") != self.hash:
            raise DataError(
                f"data state belongs to another data stream (hash {state.get('hash')!s:.12}, now {self.hash:.12}): "
                "shards, tokenizer, sources, weights, max_images, data.sequence_length or seed changed; "
                "restore them or start a new run"
            )
        try:
            self._cursors = [_Cursor(*state["sources"][index.name]) for index in self.indexes]
            self._packs = int(state["packs"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"data state cannot be used ({error!r}); start a new run") from None

    def _furthest_behind(self) -> int:
        """The source with the largest deficit of tokens; the first of equals."""
        total = sum(cursor.tokens for cursor in self._cursors) + self.sequence_length
        deficits = [w * total - c.tokens for w, c in zip(self._weights, self._cursors, strict=True)]
        return deficits.index(max(deficits))

    def _peek(self, source: int) -> int:
        """Number of the source's next sample; opens a new epoch when the last one is used up."""
        index, cursor = self.indexes[source], self._cursors[source]
        if cursor.position >= len(index):
            cursor.epoch, cursor.position = cursor.epoch + 1, 0
        epoch, order = self._orders.get(source, (-1, None))
        if epoch != cursor.epoch or order is None:
            order = Random(self.seed, "order", index.name, cursor.epoch).permutation(len(index))
            self._orders[source] = (cursor.epoch, order)
        return int(order[cursor.position])

    def _hash(self) -> str:
        mixture = [(index.name, weight) for index, weight in zip(self.indexes, self._weights, strict=True)]
        digests = [index.digest() for index in self.indexes]
        identity = json.dumps([STATE_VERSION, mixture, digests, self.sequence_length, self.seed])
        return hashlib.sha256(identity.encode()).hexdigest()


def _normalised_weights(indexes: Sequence[SourceIndex], weights: Mapping[str, float]) -> list[float]:
    names = [index.name for index in indexes]
    if not names:
        raise DataError("no data source; give at least one under data.sources")
    if len(set(names)) != len(names):
        raise DataError(f"two data sources have one name ({', '.join(names)}); give each its own")
    values = [weights[name] for name in names]
    total = sum(values)
    if min(values) < 0 or total <= 0:
        raise DataError(f"weights of the data sources are {values}; none may be negative and one must be positive")
    return [value / total for value in values]
