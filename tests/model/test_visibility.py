"""Exchanging an image changes exactly the logits of the tokens that may see it.

A token may see an image in cross-attention, or through self-attention to an earlier token of its row that does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.hf_config import from_hf
from tests.distributed import run_distributed
from tests.layouts import ONE, Degrees, build_engine, test_config
from tests.model.cases import Case, Expected, reference
from tests.training.equivalence import own_share

CASE = Case("visible", 51, rows=3, length=20, padding="none", images=((3, 2, 0), (1, 0, 4), (0, 0, 0), (2, 2, 2)))


def logits_per_exchange(rank: int, world_size: int, degrees: Degrees, expected: Expected) -> list[list[torch.Tensor]]:
    """Logits of the last rank: as they are, then with each image of the first microbatch exchanged."""
    engine = build_engine(test_config(from_hf(expected.config)), degrees, expected.state)
    first = expected.batches[0]
    variants = [first] + [exchange(first, image) for image in range(first.num_images)]
    return [engine.logits(own_share([variant, *expected.batches[1:]], engine.groups)) for variant in variants]


def exchange(batch: Batch, image: int) -> Batch:
    pixels = batch.pixels.clone()
    pixels[image] = torch.randn(pixels[image].shape, generator=torch.Generator().manual_seed(image))
    return replace(batch, pixels=pixels)


def may_see(batch: Batch, image: int) -> torch.Tensor:
    """[b,S] bool: tokens from the first that looks at the image, to the end of its row."""
    first_image = batch.images_per_row.cumsum(0) - batch.images_per_row
    looks = (batch.image_index >= 0) & (batch.image_index + first_image[:, None] == image)
    return looks.cumsum(-1) > 0


@pytest.mark.parametrize("degrees", [ONE, Degrees(tensor=2, pipeline=2, sequence=True)], ids=str)
def test_exchange_changes_exactly_what_may_see_it(degrees: Degrees) -> None:
    expected = reference(CASE)
    plain, *exchanged = run_distributed(logits_per_exchange, degrees.world_size, degrees, expected)[-1]
    batch = expected.batches[0]
    assert len(exchanged) == 5
    seen = 0
    for image, logits in enumerate(exchanged):
        changed = (logits[0] != plain[0]).any(-1)
        assert torch.equal(changed, may_see(batch, image)), f"image {image}"
        seen += int(changed.any())
        for other in range(1, 4):  # other microbatches are not touched
            assert torch.equal(logits[other], plain[other])
    assert seen >= 4
