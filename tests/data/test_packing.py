from __future__ import annotations

import itertools
import time

import numpy as np

from megatron_atum.data.packing import best_fit, fewest_rows

Sizes = tuple[list[int], list[int]]


def first_fit(tokens: list[int], images: list[int], row_tokens: int, row_images: int) -> list[list[int]]:
    """The packing of the original pipeline: each sample into the first row that takes it, in order."""
    rows: list[list[int]] = []
    left = np.zeros((0, 2), np.int64)
    for place, size in enumerate(zip(tokens, images, strict=True)):
        fits = np.flatnonzero((left >= size).all(axis=1))
        if not len(fits):
            rows.append([])
            left = np.concatenate([left, [[row_tokens, row_images]]])
            fits = np.array([len(rows) - 1])
        rows[fits[0]].append(place)
        left[fits[0]] -= size
    return rows


def fewest_by_trying(tokens: list[int], images: list[int], row_tokens: int, row_images: int) -> int:
    """The true optimum of a few samples, by trying every way to share them out."""
    best = len(tokens)
    left: list[list[int]] = []

    def place(number: int) -> None:
        nonlocal best
        if len(left) >= best:
            return
        if number == len(tokens):
            best = len(left)
            return
        for row in [*left, [row_tokens, row_images]]:
            if row[0] < tokens[number] or row[1] < images[number]:
                continue
            opened = not any(row is one for one in left)
            if opened:
                left.append(row)
            row[0], row[1] = row[0] - tokens[number], row[1] - images[number]
            place(number + 1)
            row[0], row[1] = row[0] + tokens[number], row[1] + images[number]
            if opened:
                left.pop()

    place(0)
    return best


def draw(random: np.random.Generator, count: int, row_tokens: int, row_images: int) -> Sizes:
    """Samples of one of several sorts: short, long, mixed; few or many images."""
    most = int(random.choice([row_tokens // 10 + 1, row_tokens]))
    tokens = np.maximum(random.integers(1, most + 1, count) // random.integers(1, 4, count), 1)
    images = random.integers(0, int(random.integers(1, row_images + 2)), count)
    return tokens.tolist(), images.tolist()


def documents(random: np.random.Generator, count: int) -> Sizes:
    """Lengths as those of web documents: mean 400, the longest cut to a row."""
    tokens = np.clip(random.lognormal(5.6, 0.9, count), 12, 1024).astype(int)
    return tokens.tolist(), np.minimum(random.poisson(tokens / 300), tokens // 4).tolist()


def check(rows: list[list[int]], sizes: Sizes, row_tokens: int, row_images: int) -> None:
    tokens, images = map(np.array, sizes)
    assert sorted(itertools.chain(*rows)) == list(range(len(tokens)))
    for members in rows:
        assert members == sorted(members) and members
        assert tokens[members].sum() <= row_tokens and images[members].sum() <= row_images


def test_limits_hold_and_every_sample_is_in_one_row() -> None:
    for seed in range(300):
        random = np.random.default_rng(seed)
        row_tokens, row_images = int(random.integers(1, 300)), int(random.integers(1, 12))
        sizes = draw(random, int(random.integers(0, 200)), row_tokens, row_images)
        rows = best_fit(*sizes, row_tokens, row_images)
        check(rows, sizes, row_tokens, row_images)
        assert rows == best_fit(*sizes, row_tokens, row_images)
        assert len(rows) >= fewest_rows(*sizes, row_tokens, row_images)


def test_near_the_optimum_of_a_few_samples() -> None:
    for seed in range(60):
        random = np.random.default_rng(seed)
        sizes = draw(random, 8, 60, 5)
        found, best = len(best_fit(*sizes, 60, 5)), fewest_by_trying(*sizes, 60, 5)
        assert fewest_rows(*sizes, 60, 5) <= best <= found <= best + 1


def test_no_two_rows_could_be_one() -> None:
    """Where images do not limit it, a row is only begun when no other has the room."""
    for seed in range(30):
        random = np.random.default_rng(seed)
        tokens, _ = draw(random, 150, 100, 1)
        sums = sorted(sum(tokens[n] for n in members) for members in best_fit(tokens, [0] * 150, 100, 1))
        assert len(sums) < 2 or sums[0] + sums[1] > 100


def test_fuller_rows_than_first_fit_on_documents() -> None:
    for seed in range(5):
        sizes = documents(np.random.default_rng(seed), 2000)
        ours, theirs = best_fit(*sizes, 1024, 70), first_fit(*sizes, 1024, 70)
        check(theirs, sizes, 1024, 70)
        bound = fewest_rows(*sizes, 1024, 70)
        assert len(ours) < len(theirs) and len(ours) <= 1.01 * bound


def test_captions_fill_what_documents_leave() -> None:
    assert best_fit([5, 90, 5, 95, 5], [1, 1, 1, 1, 1], 100, 9) == [[0, 3], [1, 2, 4]]


def test_captions_are_not_sorted_by_length() -> None:
    random = np.random.default_rng(1)
    tokens = random.integers(10, 60, 3000).tolist()
    rows = best_fit(tokens, [1] * 3000, 1024, 70)
    means = [np.mean([tokens[n] for n in members]) for members in rows]
    assert len(rows) <= 1.01 * fewest_rows(tokens, [1] * 3000, 1024, 70) + 1
    assert np.std(means[:-2]) < 6  # of rows of about 30 captions whose lengths deviate by 14


def test_images_bind() -> None:
    rows = best_fit([10] * 40, [1] * 40, 1024, 8)
    assert [len(members) for members in rows] == [8] * 5


def test_samples_as_large_as_a_row() -> None:
    assert best_fit([7, 7, 1], [0, 3, 1], 7, 3) == [[0], [1], [2]]
    assert best_fit([], [], 7, 3) == []


def test_a_window_is_packed_in_a_moment() -> None:
    """It is packed while a step waits for it."""
    sizes = documents(np.random.default_rng(0), 16384)
    begin = time.process_time()
    best_fit(*sizes, 1024, 70)
    assert time.process_time() - begin < 2.0
