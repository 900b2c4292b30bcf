"""The rows of one source, one after the other: a pure function of (index, row size, seed)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.order import Epoch, Group
from megatron_atum.data.packing import best_fit
from megatron_atum.data.pieces import cut_tokens, draw_piece, images_in, whole_turns
from megatron_atum.data.rng import Random
from megatron_atum.data.sidecar import Sidecar
from megatron_atum.data.tokenizer import EOS_ID
from megatron_atum.errors import DataError

WINDOW = 16384  # most samples that are packed together
STREAM_VERSION = 1  # raise it whenever the same index would give other rows


class Cut(NamedTuple):
    """The sample at `place` of a row is only the token ids `start` to `stop` of its document or conversation."""

    place: int
    start: int
    stop: int


class Row(NamedTuple):
    """Samples are numbers within the source; tokens and images are those of the whole row."""

    samples: tuple[int, ...]
    tokens: int
    images: int
    cuts: tuple[Cut, ...]


@dataclass
class Position:
    """The next row to hand out, and what came before it."""

    epoch: int = 0
    group: int = 0
    window: int = 0  # within the group
    row: int = 0  # within the window
    tokens: int = 0  # handed out so far
    dropped: dict[str, int] = field(default_factory=dict)  # as Group.dropped, of groups that are finished


class SourceStream:
    """Rows of at most `row_tokens` tokens and `index.max_images` images."""

    def __init__(self, index: SourceIndex, row_tokens: int, seed: int, group_samples: int) -> None:
        self.index = index
        self.position = Position()
        self._row_tokens, self._seed, self._group_samples = row_tokens, seed, group_samples
        self._epoch: Epoch | None = None
        self._group: tuple[tuple[int, int], Group] | None = None
        self._rows: tuple[tuple[int, int, int], list[Row]] | None = None

    def next(self) -> Row:
        """Raises DataError: a sidecar cannot be used, or no sample of a whole epoch fits a row."""
        at = self.position
        rows = self._current_rows()
        begun = at.epoch
        while at.row >= len(rows):
            self._next_window()
            if at.epoch > begun + 1:
                raise DataError(
                    f"source {self.index.name}: no sample fits into a row of {self._row_tokens} tokens; raise "
                    "data.sequence_length"
                )
            rows = self._current_rows()
        row = rows[at.row]
        at.row += 1
        at.tokens += row.tokens
        return row

    def dropped(self) -> dict[str, int]:
        """Samples that did not fit a row, and conversations shortened, of the groups that have been read."""
        return dict(self.position.dropped)

    def digest(self) -> str:
        """Hash of everything that decides the rows."""
        settings = [STREAM_VERSION, self.index.digest(), self._row_tokens, self._seed, self._group_samples, WINDOW]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def state(self) -> list[Any]:
        at = self.position
        return [at.epoch, at.group, at.window, at.row, at.tokens, dict(at.dropped)]

    def load_state(self, state: list[Any]) -> None:
        """Raises KeyError, TypeError or ValueError when it is no state."""
        *numbers, dropped = state
        epoch, group, window, row, tokens = (int(number) for number in numbers)
        groups = len(Epoch(self.index, self._seed, epoch, self._group_samples)) if epoch >= 0 else 0
        if min(epoch, group, window, row, tokens) < 0 or group >= groups:
            raise ValueError(f"{self.index.name} has no position {numbers}")
        self.position = Position(epoch, group, window, row, tokens, {str(k): int(v) for k, v in dict(dropped).items()})

    def _next_window(self) -> None:
        at = self.position
        group = self._current_group()
        at.window, at.row = at.window + 1, 0
        if at.window < _windows(group):
            return
        at.dropped = dict(sorted((Counter(at.dropped) + Counter(group.dropped)).items()))
        at.group, at.window = at.group + 1, 0
        if at.group >= len(self._current_epoch()):
            at.epoch, at.group = at.epoch + 1, 0

    def _current_epoch(self) -> Epoch:
        if self._epoch is None or self._epoch.number != self.position.epoch:
            self._epoch = Epoch(self.index, self._seed, self.position.epoch, self._group_samples)
        return self._epoch

    def _current_group(self) -> Group:
        key = (self.position.epoch, self.position.group)
        if self._group is None or self._group[0] != key:
            self._group = key, self._current_epoch().group(self.position.group, self._row_tokens)
        return self._group[1]

    def _current_rows(self) -> list[Row]:
        key = (self.position.epoch, self.position.group, self.position.window)
        if self._rows is None or self._rows[0] != key:
            self._rows = key, self._pack(_window(self._current_group(), key[2]), key)
        return self._rows[1]

    def _pack(self, window: Group, key: tuple[int, int, int]) -> list[Row]:
        tokens, images = window.tokens.tolist(), window.images.tolist()
        samples = window.samples.tolist()
        cuts = self._cut(window, tokens, images, key)
        # Sorted by size, the passes over a small source would put the same sample into a row again and again.
        in_order = self._current_epoch().passes > 1
        rows = [
            Row(
                samples=tuple(samples[n] for n in members),
                tokens=sum(tokens[n] for n in members),
                images=sum(images[n] for n in members),
                cuts=tuple(Cut(place, *cuts[n]) for place, n in enumerate(members) if n in cuts) if cuts else (),
            )
            for members in best_fit(tokens, images, self._row_tokens, self.index.max_images, in_order=in_order)
        ]
        order = self._random("rows", key).permutation(len(rows))
        return [rows[number] for number in order]

    def _cut(
        self, window: Group, tokens: list[int], images: list[int], key: tuple[int, int, int]
    ) -> dict[int, tuple[int, int]]:
        """A piece of each sample that is too long for a row; its tokens and images become the piece's."""
        cuts: dict[int, tuple[int, int]] = {}
        too_long = (window.tokens > self._row_tokens) | (window.images > self.index.max_images)
        if not too_long.any():
            return cuts
        chances = self._random("pieces", key).uniforms(len(tokens))
        for n in np.flatnonzero(too_long).tolist():
            _, sidecar, row = self.index.sample(int(window.samples[n]))
            if self.index.kind == "conversations":
                cuts[n] = self._first_turns(sidecar, row)
            else:
                cuts[n] = self._piece(sidecar, row, float(chances[n]))
            start, stop = cuts[n]
            tokens[n] = cut_tokens(start, stop, int(sidecar.sample_ids(row)[start]), self.index.kind)
            images[n] = len(images_in(sidecar.image_positions(row), start, stop))
        return cuts

    def _piece(self, sidecar: Sidecar, row: int, chance: float) -> tuple[int, int]:
        ids = sidecar.sample_ids(row)
        positions = sidecar.image_positions(row)
        piece = draw_piece(len(ids), positions, self._row_tokens, self.index.max_images, chance)
        # A sample may hold several documents: a piece from the </s> of one begins with the next.
        begins_next = int(ids[piece.start]) == EOS_ID and piece.start + 1 < piece.stop
        return piece.start + begins_next, piece.stop

    def _first_turns(self, sidecar: Sidecar, row: int) -> tuple[int, int]:
        positions = sidecar.image_positions(row)
        stop, reason = whole_turns(*sidecar.turns(row), positions, self._row_tokens, self.index.max_images)
        assert not reason, "order.py leaves those out of which no turn fits"
        return 0, stop

    def _random(self, what: str, key: tuple[int, int, int]) -> Random:
        return Random(self._seed, what, self.index.name, *key)


def _windows(group: Group) -> int:
    return max(1, -(-len(group.samples) // WINDOW))


def _window(group: Group, number: int) -> Group:
    """One of the windows, all about as long, into which a group is cut."""
    bounds: NDArray[np.int64] = np.linspace(0, len(group.samples), _windows(group) + 1).astype(np.int64)
    part = slice(bounds[number], bounds[number + 1])
    return Group(group.samples[part], group.tokens[part], group.images[part], {})
