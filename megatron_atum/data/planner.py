"""Which samples go into which pack: a pure function of (manifests, mixture, seed, number of the pack).

A pack is one row of a batch, and holds samples of one source: the one that is furthest behind its share of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.pieces import images_in
from megatron_atum.data.stream import Cut, SourceStream
from megatron_atum.errors import DataError

STATE_VERSION = 2
ON_CHANGE = ("error", "restart", "continue")


@dataclass(frozen=True)
class Pack:
    """One row: `samples` are sample numbers of the index of source number `source`."""

    id: int  # global number in the stream, from 0
    source: int
    samples: tuple[int, ...]
    tokens: int
    images: int
    cuts: tuple[Cut, ...] = ()


def images_of(index: SourceIndex, pack: Pack) -> Iterator[tuple[int, int, int]]:
    """Shard, row and number within its sample of each image of a pack, in the order of the pack's <image> tokens."""
    cuts = {cut.place: cut for cut in pack.cuts}
    for place, sample in enumerate(pack.samples):
        shard, sidecar, row = index.sample(sample)
        positions = sidecar.image_positions(row)
        shown = images_in(positions, *cuts[place][1:]) if place in cuts else range(len(positions))
        yield from ((shard, row, number) for number in shown)


class Planner:
    """The stream of packs."""

    def __init__(
        self,
        indexes: Sequence[SourceIndex],
        shares: Mapping[str, float],
        sequence_length: int,
        seed: int,
        group_samples: int,
    ) -> None:
        """
        Args:
            shares: of tokens by source, 1 in all (mixture.py).
            sequence_length: tokens of a row.
            group_samples: samples that are shuffled together.
        """
        self.indexes = list(indexes)
        self.streams = [SourceStream(index, sequence_length, seed, group_samples) for index in indexes]
        self._shares = [shares[index.name] for index in indexes]
        self._row_tokens = sequence_length
        self._packs = 0
        self.rows = 0  # handed out since the run began, also before its stream was restarted
        self._digests = [stream.digest() for stream in self.streams]
        identity = [STATE_VERSION, list(zip(self._names, self._shares, self._digests, strict=True))]
        self.hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def next(self) -> Pack:
        """The next pack of the stream."""
        source = self._furthest_behind()
        row = self.streams[source].next()
        self._packs += 1
        self.rows += 1
        return Pack(self._packs - 1, source, row.samples, row.tokens, row.images, row.cuts)

    def tokens(self) -> dict[str, int]:
        """Handed out so far, by source."""
        return {name: stream.position.tokens for name, stream in zip(self._names, self.streams, strict=True)}

    def dropped(self) -> dict[str, dict[str, int]]:
        """Samples too large for a row, by source and reason (Group.dropped), of what has been read."""
        return {name: stream.dropped() for name, stream in zip(self._names, self.streams, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream: small, global, and writable as JSON."""
        sources = {
            name: [digest, stream.state()]
            for name, digest, stream in zip(self._names, self._digests, self.streams, strict=True)
        }
        return {
            "version": STATE_VERSION,
            "hash": self.hash,
            "packs": self._packs,
            "rows": self.rows,
            "sources": sources,
        }

    def load_state_dict(self, state: Mapping[str, Any], on_change: str = "error") -> None:
        """Goes to a position of this same stream.

        Args:
            on_change: when the state belongs to another stream: `error`; `restart` begins this stream at its first
                pack, while `rows` goes on; `continue` goes on with the next number: sources that are as they were go
                on where they were, others begin, and the shares are kept from here on.

        Raises:
            DataError: the state belongs to another stream, or is none.
        """
        _check_state(state, on_change)
        try:
            if state["version"] == STATE_VERSION and state["hash"] == self.hash:
                self._load(state, {name: state["sources"][name][1] for name in self._names})
            elif on_change == "restart":
                self._load({"packs": 0, "rows": _rows(state)}, {})
            elif on_change == "continue":
                self._load(state, self._unchanged(state["sources"]))
            else:
                raise DataError(self._difference(state))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"data state cannot be used ({error!r}); start a new run") from None

    @property
    def _names(self) -> list[str]:
        return [index.name for index in self.indexes]

    def _furthest_behind(self) -> int:
        """The source with the largest deficit of tokens; the first of equals."""
        total = sum([stream.position.tokens for stream in self.streams]) + self._row_tokens
        deficits = [
            share * total - stream.position.tokens for share, stream in zip(self._shares, self.streams, strict=True)
        ]
        return deficits.index(max(deficits))

    def _load(self, state: Mapping[str, Any], positions: Mapping[str, list[Any]]) -> None:
        self._packs, self.rows = int(state["packs"]), _rows(state)
        for name, stream in zip(self._names, self.streams, strict=True):
            stream.load_state(positions.get(name, [0, 0, 0, 0, 0, {}]))

    def _unchanged(self, sources: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Positions of the sources that are as they were, their tokens counted anew."""
        found = {}
        for name, digest in zip(self._names, self._digests, strict=True):
            if name in sources and sources[name][0] == digest:
                epoch, group, window, row, _, dropped = sources[name][1]
                found[name] = [epoch, group, window, row, 0, dropped]
        return found

    def _difference(self, state: Mapping[str, Any]) -> str:
        theirs = state["sources"]
        pairs = list(zip(self._names, self._digests, strict=True))
        what = [f"source {name} is new" for name in self._names if name not in theirs]
        what += [f"source {name} is gone" for name in theirs if name not in self._names]
        what += [
            f"source {name} changed (its shards, filters, max_images, or data.tokenizer, data.sequence_length, "
            "data.shuffle_samples or training.seed)"
            for name, digest in pairs
            if name in theirs and theirs[name][0] != digest
        ]
        return (
            f"data state belongs to another data stream: {'; '.join(what) or 'the weights or their order changed'}. "
            "Restore it, start a new run, or say data.on_change=continue or restart"
        )


def _rows(state: Mapping[str, Any]) -> int:
    """A state without them is one of a stream that was never restarted."""
    return int(state.get("rows", state.get("packs", 0)))


def _check_state(state: Any, on_change: str) -> None:
    if not isinstance(state, Mapping):
        raise DataError(f"data state cannot be used: it is {state!r:.40}; start a new run")
    if state.get("version") != STATE_VERSION and on_change != "restart":
        raise DataError(f"data state has version {state.get('version')!r}, not {STATE_VERSION}; start a new run")
