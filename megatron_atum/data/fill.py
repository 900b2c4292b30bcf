"""How full rows are, and how full they could be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_atum.data.index import SourceIndex
from megatron_atum.data.packing import fewest_rows
from megatron_atum.data.pieces import cut_tokens, images_in
from megatron_atum.data.planner import Pack
from megatron_atum.data.rng import Random
from megatron_atum.data.stream import WINDOW


@dataclass(frozen=True)
class Fill:
    """Rows of one source, and rows that its samples could have taken."""

    tokens: int
    images: int
    rows: int
    bound_rows: int  # no packing needs fewer
    first_fit_rows: int  # each sample in the first row that has room, as the public code of IDEFICS packs


def fill_of(index: SourceIndex, packs: Sequence[Pack], row_tokens: int) -> Fill:
    """Args: packs: all of this source."""
    sizes = np.array(list(sample_sizes(index, packs)), np.int64).reshape(-1, 2)
    sizes = sizes[Random(0, "first fit").permutation(len(sizes))]  # samples of a row would find each other again
    windows = np.array_split(sizes, max(1, -(-len(sizes) // WINDOW)))
    return Fill(
        tokens=sum(pack.tokens for pack in packs),
        images=sum(pack.images for pack in packs),
        rows=len(packs),
        bound_rows=fewest_rows([p.tokens for p in packs], [p.images for p in packs], row_tokens, index.max_images),
        first_fit_rows=sum(first_fit(window, row_tokens, index.max_images) for window in windows),
    )


def first_fit(sizes: NDArray[np.int64], row_tokens: int, row_images: int) -> int:
    """Rows that first-fit needs.

    Args:
        sizes: [n,2] tokens and images of each sample.
    """
    room = np.full((len(sizes), 2), (row_tokens, row_images))
    rows = 0
    for size in sizes:
        fits = (room[:rows] >= size).all(axis=1)
        row = int(fits.argmax()) if fits.any() else rows
        rows += row == rows
        room[row] -= size
    return rows


def sample_sizes(index: SourceIndex, packs: Iterable[Pack]) -> Iterator[tuple[int, int]]:
    """Tokens and images of each sample, or of the piece that was taken of it."""
    for pack in packs:
        cuts = {cut.place: cut for cut in pack.cuts}
        for place, sample in enumerate(pack.samples):
            _, sidecar, row = index.sample(sample)
            if place not in cuts:
                first_token, first_image = sidecar.first_token, sidecar.first_image
                yield int(first_token[row + 1]) - int(first_token[row]), int(first_image[row + 1] - first_image[row])
                continue
            cut = cuts[place]
            positions = sidecar.image_positions(row)
            images = len(images_in(positions, cut.start, cut.stop))
            yield cut_tokens(cut.start, cut.stop, int(sidecar.sample_ids(row)[cut.start]), index.kind), images
