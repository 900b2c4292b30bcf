"""A part of a sample that is longer than a row.

Documents: sub-sequence sampling, as Flamingo and IDEFICS do it (m4 training/packing.py (long documents) and
DATA_DOCUMENTATION.md). Positions are places among the token ids of the document; an image is FAKE IMG FAKE, and
consecutive images share the FAKE between them. Conversations keep their first turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.tokenizer import BOS_ID

IMAGE_BONUS = 2.0  # on top of 1, for each image that a piece from this start would show
IMAGE_REACH = 0.75  # share of a row in front of an image that gets the bonus: a quarter is left for text after it


@dataclass(frozen=True)
class Piece:
    """Token ids `start` to `stop` of a document; <s> is put in front of a piece that does not begin with one."""

    start: int
    stop: int
    images: int


def cut_tokens(start: int, stop: int, first_id: int, kind: str) -> int:
    """Tokens of a row that a piece takes. Args: first_id: the token id at its start; kind: of its source."""
    if kind == "conversations":
        return stop - start + 1  # it is closed by a </s>
    return stop - start + (start > 0 and first_id != BOS_ID)


def draw_piece(tokens: int, images_p: NDArray[Any], row_tokens: int, row_images: int, chance: float) -> Piece:
    """A piece of at most `row_tokens` tokens and `row_images` images.

    Args:
        tokens: of the whole document.
        images_p: [p] positions of the document's <image> tokens.
        chance: random number in [0, 1).
    """
    images_p = images_p.astype(np.int64)
    total = np.cumsum(start_scores(tokens, images_p, row_tokens))
    start = int(np.searchsorted(total, chance * total[-1], side="right"))
    stop = min(tokens, start + row_tokens - (start > 0))
    first, last = np.searchsorted(images_p, [start, stop])
    if last - first > row_images:
        last = first + row_images
        stop = int(images_p[last])  # trimmed below to the end of the text before it
    if stop < tokens:
        stop, last = _trim(stop, images_p, int(last))
    return Piece(start, max(stop, start + 1), int(last - first))


def whole_turns(
    turn_ends: NDArray[Any], answers: NDArray[Any], images_p: NDArray[Any], row_tokens: int, row_images: int
) -> tuple[int, str]:
    """How much of a conversation fits a row: up to the end of an answer, since a question alone teaches no answer.

    Args:
        turn_ends: [turns] place behind the last token of each turn.
        answers: [turns] whether a turn is one of the assistant.
        images_p: [p] positions of the <image> tokens.

    Returns:
        Number of leading token ids, to be closed by a </s>; or 0, and why not even the first answer fits.
    """
    ends = turn_ends[answers].astype(np.int64)
    short = ends + 1 <= row_tokens
    fits = short & (np.searchsorted(images_p, ends) <= row_images)
    if fits.any():
        return int(ends[fits][-1]), ""
    return 0, "too_many_images" if short.any() else "too_long"


def images_in(images_p: NDArray[Any], start: int, stop: int) -> range:
    """Numbers of the images whose <image> token lies within a piece."""
    first, last = np.searchsorted(images_p, [start, stop])
    return range(int(first), int(last))


def start_scores(tokens: int, images_p: NDArray[Any], row_tokens: int) -> NDArray[np.float64]:
    """[tokens] How likely a piece begins at each token: never within an image."""
    steps = np.zeros(tokens + 1)
    np.add.at(steps, np.maximum(images_p - int(IMAGE_REACH * row_tokens), 0), IMAGE_BONUS)
    np.add.at(steps, images_p, -IMAGE_BONUS)
    scores = 1.0 + np.cumsum(steps)[:tokens]
    scores[images_p] = 0.0
    scores[np.minimum(images_p + 1, tokens - 1)] = 0.0  # the FAKE that closes an image
    return scores


def _trim(stop: int, images_p: NDArray[Any], last: int) -> tuple[int, int]:
    """Takes an image that is not whole off the end. `last` counts the images before `stop`; returns both anew."""
    if last and images_p[last - 1] == stop - 1:  # ... FAKE IMG |
        stop, last = stop - 1, last - 1
    shared = last and images_p[last - 1] == stop - 2  # the FAKE at the end also closes the image before
    if last < len(images_p) and images_p[last] == stop and not shared:  # ... FAKE |
        stop -= 1
    return stop, last
