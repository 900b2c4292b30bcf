"""Sub-sequence sampling, against a slow implementation that looks at one token at a time."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from megatron_atum.data.pieces import Piece, draw_piece, start_scores


def document(rng: random.Random, length: int, density: float) -> str:
    """One letter a token: S, E, t for text, and images as FIF, sharing the F between them."""
    tokens = "S"
    while len(tokens) < length:
        tokens += "t" * rng.randint(1, 1 + int(2 / density))
        tokens += "F" + "IF" * rng.choice([1, 1, 2, 3])
    return tokens + "t" * rng.randint(0, 3) + "E"


def places(tokens: str) -> np.ndarray:
    return np.array([n for n, token in enumerate(tokens) if token == "I"], np.int64)


def slow_scores(tokens: str, row_tokens: int) -> list[float]:
    """1 for each token, 2 more for each image that begins within 0.75 of a row behind it; 0 within an image."""
    scores = []
    for n, token in enumerate(tokens):
        score = 1.0
        for image in (m for m in range(len(tokens)) if tokens[m] == "I"):
            if image - int(0.75 * row_tokens) <= n < image:
                score += 2.0
        inside = token == "I" or (token == "F" and tokens[n - 1] == "I")
        scores.append(0.0 if inside else score)
    return scores


def may_end(tokens: str, stop: int) -> bool:
    """Whether no image is open before token `stop`: it would be after IMG, or after a FAKE that closes none."""
    before = tokens[:stop]
    return stop == len(tokens) or not (before.endswith("I") or (before.endswith("F") and not before.endswith("IF")))


def slow_stop(tokens: str, start: int, row_tokens: int, row_images: int) -> int:
    """The furthest end that is allowed."""
    stop = min(len(tokens), start + row_tokens - (start > 0))
    while tokens[start:stop].count("I") > row_images or not may_end(tokens, stop):
        stop -= 1
    return stop


def test_scores() -> None:
    for seed in range(150):
        rng = random.Random(seed)
        tokens = document(rng, rng.randint(5, 120), rng.choice([0.05, 0.3, 1.0]))
        row_tokens = rng.randint(4, 150)
        assert start_scores(len(tokens), places(tokens), row_tokens).tolist() == slow_scores(tokens, row_tokens)


def test_scores_of_a_document_without_images() -> None:
    assert start_scores(6, places("Stttt" + "E"), 4).tolist() == [1.0] * 6


def test_piece() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        row_tokens, row_images = rng.randint(8, 60), rng.randint(1, 8)
        tokens = document(rng, rng.randint(row_tokens, 6 * row_tokens), rng.choice([0.05, 0.3, 1.0]))
        scores = slow_scores(tokens, row_tokens)
        for _ in range(10):
            piece = draw_piece(len(tokens), places(tokens).astype(np.uint32), row_tokens, row_images, rng.random())
            text = tokens[piece.start : piece.stop]
            assert scores[piece.start] > 0
            assert piece.stop == slow_stop(tokens, piece.start, row_tokens, row_images)
            assert piece.images == text.count("I") <= row_images
            assert len(text) + (piece.start > 0) <= row_tokens and text
            assert piece.start == 0 or not text.startswith("I")
            assert whole_images(text)


def whole_images(text: str) -> bool:
    """Every image is FIF, with the F between neighbours shared."""
    runs = [run for run in text.strip("SE").split("t") if run.strip("SE")]
    return all(run.strip("SE") == "F" + "IF" * run.count("I") and "I" in run for run in runs)


def starts(tokens: str, row_tokens: int, draws: int) -> Counter[int]:
    chances = (np.arange(draws) + 0.5) / draws
    pieces = (draw_piece(len(tokens), places(tokens), row_tokens, 9, float(chance)) for chance in chances)
    return Counter(piece.start for piece in pieces)


@pytest.mark.parametrize("tokens", ["StttFIFtttttFIFIFttttttttE", "SFIFtE", "SttttttttE", "tttttFIFE"])
def test_starts_are_drawn_in_proportion_to_their_scores(tokens: str) -> None:
    scores = np.array(slow_scores(tokens, 12))
    found = starts(tokens, 12, 2000)
    expected = 2000 * scores / scores.sum()
    assert all(abs(found[n] - expected[n]) <= 1 for n in range(len(tokens)))


@pytest.mark.parametrize("chance", [0.0, 1.0 - 2.0**-53])
def test_first_and_last_start(chance: float) -> None:
    piece = draw_piece(40, places("S" + "t" * 35 + "FIFE"), 10, 3, chance)
    assert piece == (Piece(0, 10, 0) if chance == 0.0 else Piece(39, 40, 0))


def test_chances_on_the_boundary() -> None:
    assert [draw_piece(8, places("SttttttE"), 4, 3, n / 8).start for n in range(8)] == list(range(8))


def test_too_many_images_in_a_row_that_is_long_enough() -> None:
    tokens = "SFIFtttFIFIFttFIFtE"
    images = places(tokens)
    for limit, stop in ((1, 7), (2, 10), (3, 14), (4, 19)):
        assert draw_piece(len(tokens), images, 30, limit, 0.0) == Piece(0, stop, limit)


def test_pieces_show_more_images_than_equal_chances_would() -> None:
    tokens = "S" + "t" * 300 + "FIFttt" * 10 + "t" * 300 + "E"
    chances = (np.arange(500) + 0.5) / 500
    drawn = [draw_piece(len(tokens), places(tokens), 100, 70, float(chance)).images for chance in chances]
    evenly = [tokens[n : n + 99].count("I") for n in range(len(tokens))]
    assert np.mean(drawn) > 1.5 * np.mean(evenly)


def test_rows_of_a_few_tokens() -> None:
    """Nothing useful, but within the limits, and never empty."""
    for row_tokens in range(2, 8):
        for chance in np.linspace(0, 0.999, 50):
            piece = draw_piece(18, places("StFIFIFttFIFtttttE"), row_tokens, 1, float(chance))
            assert 0 < piece.stop - piece.start <= row_tokens - (piece.start > 0)
