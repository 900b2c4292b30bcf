"""The helpers of the contract between data and model."""

from __future__ import annotations

import pytest
import torch

from megatron_atum.batch import image_slice, images_per_tensor_rank, position_ids_from_mask, shift_labels


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
