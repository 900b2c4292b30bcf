"""One image as found on the web to one image as it is stored: upright, RGB, of bounded size, without metadata."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, ImageFile
from PIL import Image as Pillow

from megatron_atum.data.images import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
DRAFT = 2  # a JPEG may be decoded at a fraction of its size, as long as it stays this many times the stored size
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_METADATA = {"exif", "icc_profile", "xmp", "photoshop", "comment", "mp"}
_UPRIGHT = {
    2: Pillow.Transpose.FLIP_LEFT_RIGHT,
    3: Pillow.Transpose.ROTATE_180,
    4: Pillow.Transpose.FLIP_TOP_BOTTOM,
    5: Pillow.Transpose.TRANSPOSE,
    6: Pillow.Transpose.ROTATE_270,
    7: Pillow.Transpose.TRANSVERSE,
    8: Pillow.Transpose.ROTATE_90,
}


class ImageProblem(Exception):
    """An image that could not be had or used. `reason` is the word it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted, and what is stored. Sides in pixels."""

    max_side: int = 512  # longest stored side
    quality: int = 90  # of the stored JPEG
    max_bytes: int = 20_000_000  # of the file as found
    max_pixels: int = 50_000_000  # width times height as found
    min_side: int = 3  # shortest side as found
    max_aspect: float = 20.0  # longer side over shorter side
    keep_png: bool = False  # what comes as PNG is stored as PNG
    keep_fitting: bool = False  # a JPEG that needs no change is stored byte for byte


def reencode(data: bytes, limits: ImageLimits) -> bytes:
    """JPEG (or PNG, see `keep_png`) of the first frame: EXIF orientation applied, transparency on white, at most
    `max_side` on the longer side by bicubic interpolation, never enlarged, no EXIF, no colour profile.

    Raises:
        ImageProblem: too_many_bytes, not_an_image, corrupt_image (also when cut off), too_many_pixels, absurd_size,
            unsupported_mode (32-bit, floating point or Lab pixels).
    """
    if len(data) > limits.max_bytes:
        raise ImageProblem("too_many_bytes")
    image = _open(data)
    _check_size(*image.size, limits)
    found = image.size
    width, height = stored_size(*found, limits.max_side)
    image.draft(None, (DRAFT * width, DRAFT * height))  # of a JPEG only
    _load(image)
    if image.format == "TIFF":
        found = image.size  # Pillow turns them upright as it loads them
    size, orientation = stored_size(*found, limits.max_side), _orientation(image)
    if limits.keep_fitting and _needs_no_change(image, orientation, found == size):
        return data
    pixels = _to_rgb8(image).resize(size, Pillow.Resampling.BICUBIC)
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    return _encode(pixels, "PNG" if limits.keep_png and image.format == "PNG" else "JPEG", limits.quality)


def stored_size(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height in pixels with the longer side at most `max_side`, shape kept, never enlarged."""
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _open(data: bytes) -> Pillow.Image:
    try:
        return Pillow.open(io.BytesIO(data), formats=FORMATS)
    except Pillow.DecompressionBombError as error:
        raise ImageProblem("too_many_pixels") from error
    except Exception as error:  # the decoders raise whatever a broken file makes them stumble over
        raise ImageProblem("corrupt_image" if data.startswith(_MAGIC) else "not_an_image") from error


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    """By the header alone, before memory is taken for the pixels."""
    if width * height > limits.max_pixels:
        raise ImageProblem("too_many_pixels")
    short, long = sorted((width, height))
    if short < max(1, limits.min_side) or long > limits.max_aspect * short:
        raise ImageProblem("absurd_size")


def _load(image: Pillow.Image) -> None:
    # Global, and whoever sets it has half an image pass with its rest in grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image.load()
    except MemoryError:  # the size is within the limits: the machine is at fault, not the image
        raise
    except Exception as error:  # as in _open
        raise ImageProblem("corrupt_image") from error


def _orientation(image: Pillow.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _needs_no_change(image: Pillow.Image, orientation: int, fits: bool) -> bool:
    plain = image.format == "JPEG" and image.mode == "RGB" and not _METADATA & image.info.keys()
    return plain and fits and orientation == 1


def _to_rgb8(image: Pillow.Image) -> Pillow.Image:
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips 16 bits to 8, so that nearly everything turns white.
        return Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageProblem("unsupported_mode")  # no known range of values
    try:
        return to_rgb(image)
    except ValueError as error:
        raise ImageProblem("unsupported_mode") from error


def _encode(pixels: Pillow.Image, kind: str, quality: int) -> bytes:
    stream = io.BytesIO()
    pixels.info = {}  # Pillow would write a comment or a colour profile from here
    pixels.save(stream, kind, **({"quality": quality} if kind == "JPEG" else {}))
    return stream.getvalue()
