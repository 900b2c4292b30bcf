"""The helpers of the contract between data and model."""

from __future__ import annotations

import pytest
import torch
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from megatron_atum.batch import (
    image_slice,
    images_per_tensor_rank,
    normalise_pixels,
    position_ids_from_mask,
    shift_labels,
)


def test_positions_count_real_tokens_and_padding_has_position_1() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = [[1, 1, 0, 1, 2], [0, 1, 2, 1, 1], [0, 1, 2, 3, 4]]
    assert position_ids_from_mask(mask).tolist() == expected


def test_labels_are_the_next_token_and_padding_never_counts() -> None:
    ids = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 0, 0]])
    mask = (ids != 0).long()
    labels, loss_mask = shift_labels(ids, mask)
    assert loss_mask.tolist() == [[0, 0, 1, 1, 0], [1, 1, 0, 0, 0]]
    assert labels[loss_mask.bool()].tolist() == [8, 9, 6, 7]


@pytest.mark.parametrize("tensor_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_images", [0, 1, 2, 7, 8, 9])
def test_every_image_is_encoded_by_exactly_one_rank(num_images: int, tensor_size: int) -> None:
    images = torch.arange(num_images)
    shares = [images[image_slice(num_images, rank, tensor_size)] for rank in range(tensor_size)]
    assert torch.cat(shares).tolist() == images.tolist()
    most = images_per_tensor_rank(num_images, tensor_size)
    assert most >= 1
    assert all(len(share) <= most for share in shares)


def every_value() -> torch.Tensor:
    """[1,3,16,16] uint8: each value once per channel."""
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)


def test_normalised_as_hugging_face_rounds_it() -> None:
    processor = IdeficsImageProcessorPil(image_size=16)
    expected = processor(every_value()[0].permute(1, 2, 0).numpy(), return_tensors="pt")
    expected = torch.as_tensor(expected if isinstance(expected, torch.Tensor) else expected["pixel_values"])
    torch.testing.assert_close(normalise_pixels(every_value()), expected.reshape(1, 3, 16, 16), rtol=0, atol=1e-6)


def test_normalising_takes_any_strides_and_keeps_its_input() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    channels_last = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    copy = pixels.clone()
    result = normalise_pixels(channels_last)
    assert result.dtype == torch.float32 and result.is_contiguous()
    assert torch.equal(result, normalise_pixels(pixels)) and torch.equal(pixels, copy)
    assert normalise_pixels(pixels[:0]).shape == (0, 3, 8, 6)


def test_floating_point_counts_as_normalised() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pixels = torch.randn(1, 3, 4, 4).to(dtype)
        assert normalise_pixels(pixels) is pixels
