"""What a stage gets of a batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_atum.batch import normalise_pixels
from megatron_atum.model.inputs import prepare
from megatron_atum.parallel.layout import ParallelLayout
from tests.test_flops import TINY, tiny_batch


def pixels_on_stage(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    groups = SimpleNamespace(layout=ParallelLayout(world_size=1))
    batch = replace(tiny_batch(), pixels=pixels)
    return prepare([batch], TINY, groups, torch.device("cpu"), dtype)[0].pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_pixels_are_normalised_before_they_are_rounded(dtype: torch.dtype) -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = pixels_on_stage(pixels, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, normalise_pixels(pixels).to(dtype))
    assert torch.equal(result, pixels_on_stage(normalise_pixels(pixels), dtype))
    assert result.std() > 0.5 and result.max() < 3
