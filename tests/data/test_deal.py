from __future__ import annotations

import itertools

import numpy as np

from megatron_atum.data.deal import deal
from megatron_atum.data.planner import Pack


def batch(random: np.random.Generator, count: int, first: int = 0) -> list[Pack]:
    """Rows of documents with few images and rows of captions with many, as a mixture brings them."""
    many = random.random(count) < 0.2
    images = np.where(many, random.integers(20, 36, count), random.poisson(3, count))
    return [Pack(first + n, int(many[n]), (n,), 100, int(images[n])) for n in range(count)]


def images_of(packs: list[Pack]) -> int:
    return sum(pack.images for pack in packs)


def spread(sums: list[int]) -> int:
    return max(sums) - min(sums)


def rank_sums(microbatches: list[list[Pack]], ranks: int) -> list[int]:
    return [sum(map(images_of, microbatches[rank::ranks])) for rank in range(ranks)]


def cases() -> list[tuple[list[Pack], int]]:
    random = np.random.default_rng(0)
    sizes = [(1, 1), (8, 1), (64, 1), (8, 2), (64, 2), (64, 4), (96, 8), (60, 3), (6, 6), (5, 5)]
    return [(batch(random, count, 1000), size) for count, size in sizes for _ in range(20)]


def test_deals_every_pack_once() -> None:
    for packs, size in cases():
        microbatches = deal(packs, size)
        assert sorted(itertools.chain(*microbatches), key=lambda pack: pack.id) == packs
        assert all(len(microbatch) == size for microbatch in microbatches)


def test_order_is_fixed() -> None:
    for packs, size in cases():
        microbatches = deal(packs, size)
        assert deal(packs[::-1], size) == microbatches == deal(tuple(packs), size)
        assert all(microbatch == sorted(microbatch, key=lambda pack: pack.id) for microbatch in microbatches)
        sums = list(map(images_of, microbatches))
        assert sums == sorted(sums, reverse=True)


def test_ranks_are_level() -> None:
    """By no more than the largest microbatch and the smallest differ, over all steps of accumulation."""
    for packs, size in cases():
        microbatches = deal(packs, size)
        allowed = spread(list(map(images_of, microbatches)))
        for ranks in (2, 4, 8):
            if len(microbatches) % ranks == 0:
                assert spread(rank_sums(microbatches, ranks)) <= allowed


def test_ranks_work_on_neighbours() -> None:
    """What runs at the same time differs less than it does in the order of the packs."""
    random = np.random.default_rng(1)
    packs = batch(random, 128)
    in_order = [[pack] for pack in packs]

    def waiting(microbatches: list[list[Pack]], ranks: int) -> int:
        sums = list(map(images_of, microbatches))
        return sum(spread(sums[n : n + ranks]) for n in range(0, len(sums), ranks))

    for ranks in (2, 4, 8):
        assert waiting(deal(packs, 1), ranks) < 0.2 * waiting(in_order, ranks)


def test_microbatches_of_several_packs_are_leveller_than_packs_in_order() -> None:
    random = np.random.default_rng(2)
    for size in (2, 4, 8):
        ours, in_order = [], []
        for _ in range(30):
            packs = batch(random, 16 * size)
            ours.append(spread(list(map(images_of, deal(packs, size)))))
            in_order.append(spread([images_of(packs[n : n + size]) for n in range(0, len(packs), size)]))
        assert np.mean(ours) < 0.75 * np.mean(in_order)
        assert all(our <= their for our, their in zip(ours, in_order, strict=True))


def test_equal_packs_stay_in_order() -> None:
    packs = [Pack(n, 0, (n,), 100, 0) for n in range(4)]
    assert [[pack.id for pack in microbatch] for microbatch in deal(packs, 1)] == [[0], [1], [2], [3]]
