"""Image bytes to normalised pixels.

Legend: H, W height and width in pixels (both the model's image size after a transform).
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from megatron_atum.data.rng import Random
from megatron_atum.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("JPEG", "PNG", "WEBP")
CROP_SCALE = (0.9, 1.0)  # share of the area kept
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10


def decode_image(data: bytes, where: str) -> Pillow.Image:
    """Decodes JPEG, PNG or WebP to RGB, transparency on white.

    Args:
        data: content of the file.
        where: shard and key, for the message.

    Raises:
        DataError: the bytes are no complete image of these formats.
    """
    try:
        image = Pillow.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, Pillow.DecompressionBombError) as error:
        raise DataError(f"{where}: image cannot be decoded ({error}); replace or remove this sample") from error
    return to_rgb(image)


def to_rgb(image: Pillow.Image) -> Pillow.Image:
    """RGB image; alpha (or a transparent palette colour) composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = Pillow.alpha_composite(white, image)
    return image.convert("RGB")


def eval_transform(image: Pillow.Image, image_size: int) -> Tensor:
    """Squashes the whole image to a square. Returns [3,H,W] float32, normalised."""
    return _normalise(_resize(image, image_size))


def train_transform(image: Pillow.Image, image_size: int, random: Random) -> Tensor:
    """Random resized crop: a part of the image, stretched to a square. Returns [3,H,W] float32, normalised."""
    box = random_crop_box(*image.size, random)
    return _normalise(_resize(image.crop(box), image_size))


def random_crop_box(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop, drawn as torchvision's RandomResizedCrop does."""
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(*CROP_SCALE)
        ratio = math.exp(random.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.integer(width - w + 1), random.integer(height - h + 1)
            return left, top, left + w, top + h
    return _central_box(width, height)


def _central_box(width: int, height: int) -> tuple[int, int, int, int]:
    """The largest central crop within the allowed ratios: what very long images get."""
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = min(height, round(width / CROP_RATIO[0]))
    elif width / height > CROP_RATIO[1]:
        w = min(width, round(height * CROP_RATIO[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resize(image: Pillow.Image, image_size: int) -> Pillow.Image:
    return image.resize((image_size, image_size), Pillow.Resampling.BICUBIC)


def _normalise(image: Pillow.Image) -> Tensor:
    """[3,H,W] float32: (value / 255 - mean) / std."""
    unit = np.asarray(image, dtype=np.float32) / np.float32(255.0)
    values = (unit - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
