"""Which packs of a global batch share a microbatch, and in which order microbatches are dealt out.

Stages wait for the slowest rank, and images are what makes microbatches uneven. So packs are dealt to microbatches
until all hold about as many images, and microbatches are sorted: data-parallel rank q % size gets microbatch q, so
ranks work on neighbours in that order at the same time, and their sums differ by less than the largest microbatch
differs from the smallest. Neither depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_atum.data.planner import Pack


def deal(packs: Sequence[Pack], micro_batch_size: int) -> list[list[Pack]]:
    """The packs of a step as microbatches, those with the most images first.

    Args:
        packs: of one global batch, a multiple of `micro_batch_size`.
    """
    count = len(packs) // micro_batch_size
    microbatches: list[list[Pack]] = [[] for _ in range(count)]
    by_images = sorted(packs, key=lambda pack: (-pack.images, pack.id))
    for begin in range(0, len(packs), count):
        # Each round gives one pack to each microbatch, the largest to the one that has the fewest images so far.
        emptiest = sorted(microbatches, key=_images)
        for microbatch, pack in zip(emptiest, by_images[begin : begin + count], strict=True):
            microbatch.append(pack)
    for microbatch in microbatches:
        microbatch.sort(key=lambda pack: pack.id)
    return sorted(microbatches, key=lambda microbatch: (-_images(microbatch), microbatch[0].id))


def _images(packs: Sequence[Pack]) -> int:
    return sum(pack.images for pack in packs)
