import io
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from megatron_atum.batch import normalise_pixels
from megatron_atum.data.images import (
    IMAGE_FAULTS,
    MAX_PIXELS,
    ImageFault,
    decode_image,
    eval_pixels,
    random_crop_box,
    train_pixels,
)
from megatron_atum.data.rng import Random

SIZE = 56


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(mode: str, width: int = 90, height: int = 61) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def smooth(width: int, height: int) -> Image.Image:
    """Like a photograph, it has little detail at the finest scale."""
    return noise("RGB", 24, 18).resize((width, height), Image.Resampling.BICUBIC)


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"
    )


def palette_with_transparency() -> bytes:
    return encode(noise("RGB").quantize(16), "PNG", transparency=3)


def sources() -> dict[str, bytes]:
    return {
        "jpeg": encode(noise("RGB"), "JPEG"),
        "grey jpeg": encode(noise("L"), "JPEG"),
        "cmyk jpeg": encode(noise("CMYK"), "JPEG"),
        "png": encode(noise("RGB"), "PNG"),
        "png with alpha": encode(noise("RGBA"), "PNG"),
        "grey png with alpha": encode(noise("LA"), "PNG"),
        "palette": palette_with_transparency(),
        "webp": encode(noise("RGBA"), "WEBP"),
        "one pixel": encode(noise("RGB", 1, 1), "PNG"),
    }


def normalised(pixels_HW3: NDArray[np.uint8]) -> torch.Tensor:
    """What the model sees of an image: [3,H,W]."""
    return normalise_pixels(torch.tensor(pixels_HW3).permute(2, 0, 1)[None])[0]


def hugging_face(image: Image.Image, size: int) -> torch.Tensor:
    found = IdeficsImageProcessorPil(image_size=size)(image, return_tensors="pt")
    return torch.as_tensor(found if isinstance(found, torch.Tensor) else found["pixel_values"]).reshape(3, size, size)


# equal to Hugging Face -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources())
def test_eval_equals_hugging_face(name: str):
    data = sources()[name]
    ours = normalised(eval_pixels(decode_image(data), SIZE))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, hugging_face(Image.open(io.BytesIO(data)), SIZE), rtol=0, atol=1e-6)


def test_eval_equals_hugging_face_on_photographs(tiny: Path):
    for path in sorted((tiny / "photos").glob("*.jpg")):
        ours = normalised(eval_pixels(decode_image(path.read_bytes()), 224))
        torch.testing.assert_close(ours, hugging_face(Image.open(path), 224), rtol=0, atol=1e-6)


def test_transparent_becomes_white():
    clear = decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG"))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


# the crop of training ------------------------------------------------------------------------------------------------


def test_train_depends_on_its_numbers_only():
    image = noise("RGB", 80, 80)
    first = train_pixels(image, SIZE, Random(1, "crop", 4, 0))
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    assert np.array_equal(first, train_pixels(image, SIZE, Random(1, "crop", 4, 0)))
    assert not np.array_equal(first, train_pixels(image, SIZE, Random(1, "crop", 4, 1)))
    assert not np.array_equal(first, eval_pixels(image, SIZE))


def test_train_sees_nothing_outside_of_its_crop():
    """As torchvision: crop, then resize."""
    image = noise("RGB", 200, 150)
    box = random_crop_box(200, 150, Random(1, "crop", 4, 0))
    alone = Image.new("RGB", (200, 150))
    alone.paste(image.crop(box), box[:2])
    assert box != (0, 0, 200, 150)
    expected = np.asarray(alone.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert np.array_equal(train_pixels(image, SIZE, Random(1, "crop", 4, 0)), expected)
    assert np.array_equal(train_pixels(alone, SIZE, Random(1, "crop", 4, 0)), expected)


def test_the_stream_of_crops_stays():
    """A change of these boxes would change every run that is resumed."""
    boxes = [random_crop_box(400, 300, Random(7, "crop", pack, 1)) for pack in range(3)]
    assert boxes == [(0, 0, 400, 300), (9, 4, 387, 299), (21, 6, 393, 300)]


def test_crop_keeps_within_its_bounds():
    boxes = [random_crop_box(400, 300, Random(0, "crop", number)) for number in range(300)]
    shares = [(right - left) * (bottom - top) / 120_000 for left, top, right, bottom in boxes]
    ratios = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    assert all(0 <= left < right <= 400 and 0 <= top < bottom <= 300 for left, top, right, bottom in boxes)
    assert 0.89 < min(shares) < 0.92 and 0.98 < max(shares) <= 1.0
    assert min(ratios) < 1.25 and max(ratios) < 1.36
    assert len(set(boxes)) > 150


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (494, 0, 507, 10)), (10, 1000, (0, 494, 10, 507))])
def test_crop_of_a_very_long_image_is_central(width: int, height: int, box: tuple[int, ...]):
    left, top, right, bottom = random_crop_box(width, height, Random(0, "crop"))
    assert abs(left - box[0]) <= 1 and abs(top - box[1]) <= 1 and abs(right - box[2]) <= 1 and abs(bottom - box[3]) <= 1


# draft ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "side", "decoded"),
    [
        ((640, 480), 0, (640, 480)),
        ((640, 480), 481, (640, 480)),  # half would be shorter than asked for
        ((640, 480), 240, (320, 240)),
        ((640, 480), 60, (80, 60)),
        ((640, 480), 1, (80, 60)),
        ((641, 481), 120, (161, 121)),
    ],
)
def test_draft_takes_the_smallest_scale_that_is_large_enough(
    size: tuple[int, int], side: int, decoded: tuple[int, int]
):
    assert decode_image(encode(smooth(*size), "JPEG"), draft_side=side).size == decoded


def test_draft_changes_pixels_a_little():
    data = encode(smooth(900, 600), "JPEG", quality=90)
    full, draft = (eval_pixels(decode_image(data, side), SIZE).astype(int) for side in (0, 2 * SIZE))
    assert 0 < np.abs(full - draft).max() <= 4
    assert np.abs(full - draft).mean() < 0.5


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_draft_is_for_jpeg_only(format: str):
    assert decode_image(encode(smooth(640, 480), format), draft_side=56).size == (640, 480)


# faults --------------------------------------------------------------------------------------------------------------


def reason_of(data: bytes, **options: int) -> str:
    with pytest.raises(ImageFault) as caught:
        decode_image(data, **options)
    return caught.value.reason


def corrupt() -> dict[str, bytes]:
    jpeg, png, webp = (encode(noise("RGB"), format) for format in ("JPEG", "PNG", "WEBP"))
    return {
        "text": b"not an image",
        "empty": b"",
        "gif": encode(noise("L"), "GIF"),
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "half a png": png[: len(png) // 2],
        "half a webp": webp[: len(webp) // 2],
        "jpeg without its end": jpeg[:-40],
        "side of 0": png_header(0, 5),
    }


@pytest.mark.parametrize("name", corrupt())
def test_corrupt_bytes(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as m4 sets it, for everyone in the process
    assert reason_of(corrupt()[name]) == "corrupt_image"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damage_anywhere_is_a_fault_or_an_image(format: str):
    good = encode(noise("RGB", 40, 30), format)
    random = np.random.default_rng(5)
    faults = 0
    for _ in range(300):
        data = bytearray(good)
        for place in random.integers(0, min(len(good), 400), 3):
            data[place] = random.integers(256)
        try:
            decode_image(bytes(data), draft_side=10)
        except ImageFault:
            faults += 1
    assert faults > 20


@pytest.mark.parametrize("error", [struct.error, SyntaxError, OverflowError, ValueError, IndexError, ZeroDivisionError])
def test_whatever_a_decoder_raises_is_a_corrupt_image(error: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def load(self: object) -> None:
        raise error("stumbled")

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    assert reason_of(encode(noise("RGB"), "JPEG")) == "corrupt_image"


def test_a_lack_of_memory_is_not_the_images_fault(monkeypatch: pytest.MonkeyPatch):
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", load)
    with pytest.raises(MemoryError):
        decode_image(encode(noise("RGB"), "JPEG"))


def test_a_bomb_is_found_by_its_header(monkeypatch: pytest.MonkeyPatch):
    assert reason_of(png_header(100_000, 100_000)) == "decompression_bomb"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # others switch Pillow's own check off
    assert reason_of(png_header(MAX_PIXELS, 1)) != "decompression_bomb"
    assert reason_of(png_header(MAX_PIXELS + 1, 1)) == "decompression_bomb"


def test_the_limit_of_pixels_is_a_choice():
    data = encode(noise("RGB", 20, 10), "JPEG")
    assert decode_image(data, max_pixels=200).size == (20, 10)
    assert reason_of(data, max_pixels=199) == "decompression_bomb"
    assert reason_of(data, max_pixels=199, draft_side=1) == "decompression_bomb"


def test_absurd_sizes():
    for width, height in ((400, 2), (2, 400)):
        assert decode_image(encode(Image.new("RGB", (width, height)), "PNG")).size == (width, height)
    for width, height in ((401, 2), (2, 401)):
        assert reason_of(png_header(width, height)) == "absurd_size"


def test_a_fault_says_what_is_wrong_and_survives_a_worker():
    with pytest.raises(ImageFault) as caught:
        decode_image(b"not an image")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.reason, str(copy)) == ("corrupt_image", str(caught.value))
    assert "12 bytes with no header" in str(copy)


def test_codes_of_faults_are_stored_and_stay():
    assert IMAGE_FAULTS == ("corrupt_image", "decompression_bomb", "absurd_size", "missing_shard")
