"""Image bytes to uint8 pixels of the model's size; `batch.normalise_pixels` does the rest on the device.

Legend: H, W height and width in pixels (both the model's image size after a transform).
"""

from __future__ import annotations

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageFile, UnidentifiedImageError

from megatron_atum.data.rng import Random

FORMATS = ("JPEG", "PNG", "WEBP")
# Position + 1 is stored as a code: append only. "missing_shard" is raised where shards are read.
IMAGE_FAULTS = ("corrupt_image", "decompression_bomb", "absurd_size", "missing_shard")
MAX_PIXELS = 178_956_970  # where Pillow refuses too
MAX_ASPECT_RATIO = 200  # scaled to 224 pixels with its shape kept, a longer image would be a line one pixel thick
CROP_SCALE = (0.9, 1.0)  # share of the area kept
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
CROP_TRIES = 10


class ImageFault(Exception):
    """An image that cannot be used. `reason` is one of IMAGE_FAULTS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})"


def decode_image(data: bytes, draft_side: int = 0, max_pixels: int = MAX_PIXELS) -> Pillow.Image:
    """Decodes JPEG, PNG or WebP to RGB, transparency on white.

    Args:
        data: content of the file.
        draft_side: > 0 decodes a JPEG at the smallest of the scales 1, 1/2, 1/4, 1/8 that leaves both sides at least
            this long. Large images decode faster, and pixels change a little; 0 decodes in full.
        max_pixels: most pixels by the header, before anything is decoded. Pillow's own limit holds as well.

    Raises:
        ImageFault: the bytes are no complete image of these formats, or its size is out of bounds.
    """
    # Global, and whoever sets it has half an image pass with its rest in grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Pillow.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size, max_pixels)
        if draft_side > 0:
            image.draft(None, (draft_side, draft_side))
        image.load()
        return to_rgb(image)
    except (
        ImageFault,
        MemoryError,
    ):  # a size within bounds: memory is short on this machine, the image is not to blame
        raise
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning) as error:
        raise ImageFault("decompression_bomb", str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageFault("corrupt_image", f"{len(data)} bytes with no header of a JPEG, PNG or WebP") from error
    except Exception as error:  # decoders let out whatever a broken file makes them stumble over
        raise ImageFault("corrupt_image", f"{type(error).__name__}: {error}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageFault("decompression_bomb", f"{width}x{height} pixels, more than {max_pixels}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageFault(
            "absurd_size", f"{width}x{height} pixels, one side more than {MAX_ASPECT_RATIO} times the other"
        )


def to_rgb(image: Pillow.Image) -> Pillow.Image:
    """RGB image; alpha (or a transparent palette colour) composited on white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = Pillow.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eval_pixels(image: Pillow.Image, image_size: int) -> NDArray[np.uint8]:
    """Squashes the whole image to a square. Returns [H,W,3] uint8, read-only."""
    return np.asarray(image.resize((image_size, image_size), Pillow.Resampling.BICUBIC))


def train_pixels(image: Pillow.Image, image_size: int, random: Random) -> NDArray[np.uint8]:
    """Random resized crop: a part of the image, stretched to a square. Returns [H,W,3] uint8, read-only."""
    # Not resize(box=...): that reads pixels beyond the crop, and the borders differ from torchvision's.
    return eval_pixels(image.crop(random_crop_box(*image.size, random)), image_size)


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
