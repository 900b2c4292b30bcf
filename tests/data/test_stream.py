from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from megatron_atum.data import order, stream
from megatron_atum.data.index import SourceIndex
from megatron_atum.data.pieces import start_scores
from megatron_atum.data.stream import Row, SourceStream
from megatron_atum.data.tokenizer import BOS_ID
from megatron_atum.errors import DataError
from tests.data.conftest import fake_index, fake_sidecar, random_index

ROW = 100


@pytest.fixture(autouse=True)
def single_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SMALL", 1)


def documents() -> SourceIndex:
    """Some are too long, or have too many images."""
    return random_index("web", [60, 45, 70, 25], (10, 220), (0, 12))


def pairs() -> SourceIndex:
    return random_index("pairs", [80, 40, 60], (8, 30), (1, 2), "pairs", max_images=5)


def make(index: SourceIndex, seed: int = 1, row: int = ROW, group_samples: int = 90) -> SourceStream:
    return SourceStream(index, row, seed, group_samples)


def take(one: SourceStream, count: int) -> list[Row]:
    return [one.next() for _ in range(count)]


def epochs(one: SourceStream, count: int) -> list[list[Row]]:
    """The rows of the first epochs."""
    rows: list[list[Row]] = [[] for _ in range(count + 1)]
    while not rows[count]:
        row = one.next()
        rows[one.position.epoch].append(row)
    return rows[:count]


@pytest.mark.parametrize("window", [10, 64, 16384])
@pytest.mark.parametrize("group_samples", [1, 90, 10**6])
@pytest.mark.parametrize("make_index", [documents, pairs])
def test_every_sample_once_an_epoch(
    make_index: Any, group_samples: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "WINDOW", window)
    index = make_index()
    found = epochs(make(index, group_samples=group_samples), 3)
    for rows in found:
        assert sorted(sample for row in rows for sample in row.samples) == list(range(len(index)))
    assert found[0] != found[1] != found[2]


@pytest.mark.parametrize("make_index", [documents, pairs])
def test_rows_are_within_the_limits_and_say_what_they_hold(make_index: Any) -> None:
    index = make_index()
    one = make(index)
    rows = take(one, 500)
    assert one.position.tokens == sum(row.tokens for row in rows)
    for row in rows:
        cuts = {cut.place: cut for cut in row.cuts}
        tokens, images = 0, 0
        for place, sample in enumerate(row.samples):
            _, sidecar, number = index.sample(sample)
            positions, length = sidecar.image_positions(number), int(sidecar.tokens[number])
            too_large = length > ROW or len(positions) > index.max_images
            assert too_large == (place in cuts)
            _, start, stop = cuts.get(place, (place, 0, length))
            inside = int(((positions >= start) & (positions < stop)).sum())
            tokens, images = tokens + stop - start + (start > 0), images + inside
        assert (row.tokens, row.images) == (tokens, images)
        assert row.samples and 0 < tokens <= ROW and images <= index.max_images


def test_function_of_index_seed_and_group() -> None:
    rows = take(make(documents()), 100)
    assert take(make(documents()), 100) == rows
    for other in (make(documents(), seed=2), make(documents(), group_samples=40), make(documents(), row=101)):
        assert take(other, 100) != rows


def test_rows_are_full() -> None:
    for index in (
        random_index("web", [900], (5, 100), (0, 3)),
        random_index("pairs", [900], (5, 30), (1, 2), "pairs", 70),
    ):
        (rows,) = epochs(make(index), 1)
        assert sum(row.tokens for row in rows) / (ROW * len(rows)) > 0.95


def test_rows_are_shuffled() -> None:
    """Rows of large samples come first out of the packing, and must not in the stream."""
    (rows,) = epochs(make(random_index("web", [2000], (5, 100), (0, 3))), 1)
    counts = np.array([len(row.samples) for row in rows])
    assert abs(np.corrcoef(np.arange(len(counts)), counts)[0, 1]) < 0.1


def test_pieces_begin_as_often_as_their_scores_say() -> None:
    """Chi-square over many epochs of three long documents."""
    positions = np.array([10, 15, 17, 40])
    one = make(fake_index("web", [fake_sidecar("documents", [50] * 3, [positions.tolist()] * 3)]), row=20)
    rows = take(one, 2400)
    starts = [cut.start for row in rows for cut in row.cuts]
    assert one.position.epoch > 500 and all(len(row.cuts) == len(row.samples) for row in rows)
    scores = start_scores(50, positions, 20)
    expected = len(starts) * scores / scores.sum()
    found = np.bincount(starts, minlength=50)
    used = expected > 0
    assert found[~used].sum() == 0 and used.sum() == 42
    assert ((found[used] - expected[used]) ** 2 / expected[used]).sum() < 74.7  # 41 degrees of freedom, 0.1 %


def test_documents_are_cut_at_different_places() -> None:
    one = make(fake_index("web", [fake_sidecar("documents", [500] * 9, [[]] * 9)]), row=20)
    assert len({row.cuts for row in take(one, 9)}) > 6


def boundaries(one: SourceStream, count: int) -> list[int]:
    """Numbers of rows before which a window, group or epoch ends."""
    found, last = [], (0, 0, 0)
    for number in range(count):
        one.next()
        at = (one.position.epoch, one.position.group, one.position.window)
        if at != last:
            found, last = [*found, number], at
    return found


@pytest.mark.parametrize("make_index", [documents, pairs])
def test_state_equals_replay(make_index: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "WINDOW", 40)
    rows = take(make(make_index()), 400)
    edges = boundaries(make(make_index()), 300)
    assert len(edges) > 6
    places = {0, 1, 17, *edges, *(edge + 1 for edge in edges), *(edge - 1 for edge in edges if edge)}
    one = make(make_index())
    used = make(make_index())
    for done in range(max(places) + 1):
        if done in places:
            state = json.loads(json.dumps(one.state()))
            for resumed in (make(make_index()), used):  # whatever it did before
                resumed.load_state(state)
                assert resumed.state() == one.state()
                assert take(resumed, 30) == rows[done : done + 30]
        one.next()


def test_what_does_not_fit_is_counted_once_a_group() -> None:
    index = fake_index("pairs", [fake_sidecar("pairs", [50, 200, 60], [[2], [2], [2]])] * 2, "pairs")
    one = make(index, group_samples=1)
    assert one.dropped() == {}
    counts = []
    for _ in range(9):
        one.next()
        counts.append(one.dropped().get("too_long", 0))
    assert counts == [0, 0, 1, 1, 2, 2, 3, 3, 4]


def test_nothing_fits() -> None:
    one = make(fake_index("pairs", [fake_sidecar("pairs", [50, 60], [[2], [2]])], "pairs"), row=20)
    with pytest.raises(DataError, match=r"source pairs: no sample fits .* 20 tokens; raise data.sequence_length"):
        one.next()


def test_empty_groups_are_passed_over() -> None:
    sidecars = [fake_sidecar("pairs", [size], [[2]]) for size in (200, 30, 200, 200, 200)]
    one = make(fake_index("pairs", sidecars, "pairs"), group_samples=1)
    assert [row.samples for row in take(one, 4)] == [(1,)] * 4
    assert one.position.epoch == 3


def test_digest_holds_all_that_decides() -> None:
    one = make(documents())
    assert make(documents()).digest() == one.digest()
    others = [
        make(documents(), seed=2),
        make(documents(), row=101),
        make(documents(), group_samples=91),
        make(random_index("web", [60, 45, 70, 26], (10, 220), (0, 12))),
        make(random_index("web", [60, 45, 70, 25], (10, 220), (0, 12), max_images=7)),
        make(random_index("web2", [60, 45, 70, 25], (10, 220), (0, 12))),
    ]
    assert len({one.digest(), *(other.digest() for other in others)}) == len(others) + 1


def test_digest_depends_on_the_window_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make(documents()).digest()
    for name in ("WINDOW", "STREAM_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(stream, name, 99)
            assert make(documents()).digest() != before


@pytest.mark.parametrize(
    "state", [[], [0, 0, 0, 0, 0], [0, 0, 0, -1, 0, {}], ["x", 0, 0, 0, 0, {}], [0, 0, 0, 0, 0, 5]]
)
def test_no_state(state: list[Any]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        make(documents()).load_state(state)


def test_a_row_of_a_small_source_seldom_repeats_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes are packed together; sorted by size, they would fill rows with one sample."""
    monkeypatch.setattr(order, "SMALL", 2048)
    index = random_index("few", [10], (12, 20), (1, 2), "pairs", max_images=8)
    stream = SourceStream(index, 128, seed=1, group_samples=64)
    rows = [stream.next() for _ in range(200)]
    assert sum(row.tokens for row in rows) / (200 * 128) > 0.9
    assert sum(len(row.samples) - len(set(row.samples)) for row in rows) / 200 < 2


def test_a_piece_that_begins_with_a_document_gets_no_second_begin() -> None:
    sidecar = fake_sidecar("documents", [40], [[]])
    sidecar.arrays["ids"] = sidecar.ids = np.full(40, BOS_ID, np.uint16)
    marked = SourceStream(fake_index("marked", [sidecar]), 16, 1, 64)
    plain = SourceStream(fake_index("plain", [fake_sidecar("documents", [40], [[]])]), 16, 1, 64)
    for rows, more in ((marked, 0), (plain, 1)):
        for row in (rows.next() for _ in range(30)):
            cuts = {cut.place: cut for cut in row.cuts}
            lengths = [cuts[n].stop - cuts[n].start + more * (cuts[n].start > 0) for n in range(len(row.samples))]
            assert row.tokens == sum(lengths) <= 16
