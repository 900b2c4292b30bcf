"""How full rows are, how full they could be, and how full first-fit makes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_atum.data.fill import Fill, fill_of, first_fit, sample_sizes
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.planner import Pack, Planner
from tests.data.conftest import random_index

ROW = 64


def planned() -> Iterator[tuple[SourceIndex, Pack]]:
    found = [
        random_index("web", [150, 150], (10, 120), (0, 4)),
        random_index("captions", [300, 200], (6, 20), (1, 2), "pairs", max_images=5),
    ]
    planner = Planner(found, {"web": 0.75, "captions": 0.25}, ROW, 3, 200)
    for pack in (planner.next() for _ in range(400)):
        yield found[pack.source], pack


def test_first_fit_takes_the_first_row_with_room_for_both() -> None:
    sizes = np.array([[6, 1], [6, 1], [4, 0], [3, 2], [4, 1]])
    assert first_fit(sizes, 10, 2) == 3  # 6+4, 6+4; the 3 tokens of two images go nowhere
    assert first_fit(np.array([[1, 2]] * 4), 10, 4) == 2 and first_fit(np.array([[1, 2]] * 4), 10, 3) == 4
    assert first_fit(sizes, 10, 3) == 3 and first_fit(sizes, 20, 5) == 2 and first_fit(sizes[:0], 10, 2) == 0


def test_fill_is_that_of_the_rows_and_pieces_count_as_they_are() -> None:
    both = list(planned())
    index = both[0][0]
    packs = [pack for of, pack in both if of is index]
    assert any(pack.cuts for pack in packs)
    fill = fill_of(index, packs, ROW)
    assert (fill.tokens, fill.rows) == (sum(pack.tokens for pack in packs), len(packs))
    assert fill.images == sum(pack.images for pack in packs)
    assert fill.bound_rows <= fill.rows and fill.bound_rows <= fill.first_fit_rows
    assert fill_of(index, [], ROW) == Fill(0, 0, 0, 0, 0)


def test_sizes_add_up_to_those_of_the_rows() -> None:
    for index, pack in planned():
        sizes = list(sample_sizes(index, [pack]))
        assert (sum(tokens for tokens, _ in sizes), sum(images for _, images in sizes)) == (pack.tokens, pack.images)
