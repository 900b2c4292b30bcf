"""Samples into rows, with little padding: best fit over a window of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

LARGE = 8  # a sample of more than 1/8 of a row is placed before the small ones
TRIES = 8  # rows looked at whose tokens would do, but which have no room for the images


def best_fit(
    tokens: Sequence[int], images: Sequence[int], row_tokens: int, row_images: int, *, in_order: bool = False
) -> list[list[int]]:
    """Rows of sample numbers; every sample is in one row.

    Large samples go first, the largest of them foremost, each into the row that it fills best; the small ones then
    fill what is left, in the order given: sorted as well, rows would hold captions of one length only. Samples of a
    row keep the order given.

    Args:
        tokens, images: of each sample; none above the limits of a row.
        row_tokens, row_images: most of a row.
        in_order: place all samples in the order given.
    """
    large = [place for place, size in enumerate(tokens) if size * LARGE > row_tokens and not in_order]
    small = [place for place, size in enumerate(tokens) if size * LARGE <= row_tokens or in_order]
    large.sort(key=lambda place: -tokens[place])
    rows: list[list[int]] = []
    images_left: list[int] = []
    by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # open rows by the tokens they have room for
    rooms = 0  # bit r is set when by_room[r] is not empty
    for place in [*large, *small]:
        size, count = tokens[place], images[place]
        found = rooms >> size
        tries = TRIES
        while found and tries:
            room = size + (found & -found).bit_length() - 1
            row = by_room[room][-1]
            if images_left[row] >= count:
                by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
                break
            found &= found - 1
            tries -= 1
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
            images_left.append(row_images)
        rows[row].append(place)
        images_left[row] -= count
        room -= size
        if room and images_left[row] > 0:
            by_room[room].append(row)
            rooms |= 1 << room
    for members in rows:
        members.sort()
    return rows


def fewest_rows(tokens: Sequence[int], images: Sequence[int], row_tokens: int, row_images: int) -> int:
    """No packing needs fewer."""
    return max(math.ceil(sum(tokens) / row_tokens), math.ceil(sum(images) / row_images))
