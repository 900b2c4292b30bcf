"""The contract between `data` (which builds batches) and `model` (which consumes them).

Legend of the shape letters: b rows of a microbatch, S tokens of a row, I images of a row, N images of a
microbatch (all rows, row-major), n images held by this rank.

This module imports torch and nothing else, so that both sides can depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PAD_POSITION = 1  # Hugging Face gives padding the position 1 (modeling_idefics.py: IdeficsModel.forward)
NO_IMAGE = -1
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Batch:
    """One microbatch of one data-parallel rank. All tensors lie on the CPU.

    Every model-parallel rank of a data-parallel rank holds the same values, except for `pixels`: images are
    numbered row-major over the microbatch and tensor rank `t` of `T` holds the images of
    `image_slice(N, t, T)`. Ranks that encode no image (later pipeline stages) hold `pixels` of length 0.
    """

    input_ids: Tensor  # [b,S] int64
    labels: Tensor  # [b,S] int64: the token after each position (any value where loss_mask is 0)
    loss_mask: Tensor  # [b,S] float32: 1 where the position counts in the cross entropy
    z_mask: Tensor  # [b,S] float32: 1 where the position counts in the z-loss (real tokens, not <image>)
    position_ids: Tensor  # [b,S] int64: PAD_POSITION at padding
    pixels: Tensor  # [n,3,H,W] uint8 as decoded, or float32 already normalised
    image_index: Tensor  # [b,S] int64: which image of its own row a token sees, NO_IMAGE for none
    images_per_row: Tensor  # [b] int64
    source: tuple[str, ...]  # [b] name of each row's data source
    pack_ids: Tensor  # [b] int64: global number of each row in the data stream
    # Only for inputs that are not packed rows padded on the right (inference, parity with Hugging Face):
    attention_mask: Tensor | None = None  # [b,S] bool: False at padding; None: no token attends to padding anyway
    image_attention_mask: Tensor | None = None  # [b,S,I] bool: replaces image_index when a token sees several images

    @property
    def num_images(self) -> int:
        return int(self.images_per_row.sum())


@dataclass
class StepData:
    """All microbatches of one global step on one rank, and what the data side knows about the step."""

    microbatches: list[Batch]
    faults: int = 0  # samples and images lost to faults so far, on all ranks
    messages: tuple[str, ...] = ()  # what was lost in this step


def images_per_tensor_rank(num_images: int, tensor_size: int) -> int:
    """Most images that one tensor rank encodes; every rank pads to it for the gather, so it is never 0."""
    return max(1, -(-num_images // tensor_size))


def image_slice(num_images: int, tensor_rank: int, tensor_size: int) -> slice:
    """Which images of a microbatch a tensor rank decodes and encodes. May be empty."""
    share = images_per_tensor_rank(num_images, tensor_size)
    start = min(num_images, tensor_rank * share)
    return slice(start, min(num_images, start + share))


def normalise_pixels(pixels: Tensor) -> Tensor:
    """(value / 255 - mean) / std per channel, on the device of its input.

    Args:
        pixels: [n,3,H,W] uint8 of any strides; floating point is taken as normalised.

    Returns:
        [n,3,H,W] contiguous float32, rounded as by HF's PIL processor; or the input itself if it was floating point.
    """
    if pixels.is_floating_point():
        return pixels
    # Channels are brought in order while they are bytes, and numbers per channel need no transfer to the device.
    values = pixels.contiguous().to(torch.float32).div_(255)
    for channel, (mean, std) in enumerate(zip(CLIP_MEAN, CLIP_STD, strict=True)):
        values[:, channel].sub_(mean).div_(std)
    return values


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only (HF modeling_idefics.py: IdeficsModel.forward).

    Args:
        attention_mask: [b,S], 0 at padding.

    Returns:
        [b,S] int64; PAD_POSITION where the mask is 0.
    """
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, PAD_POSITION)


def shift_labels(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token labels and their mask: position t counts iff tokens t and t+1 are real.

    m4 (IdeficsForCausalLM.forward) asks it of t+1 only, which is the same for its padding on the right; with padding
    on the left, what a padding position computes must not enter the loss.

    Returns:
        labels [b,S] int64 and loss_mask [b,S] float32; the last position never counts.
    """
    labels = torch.roll(input_ids, shifts=-1, dims=-1)
    real = attention_mask.to(torch.float32)
    loss_mask = real * torch.roll(real, shifts=-1, dims=-1)
    loss_mask[:, -1] = 0.0
    return labels, loss_mask
