import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

from megatron_atum.data.images import decode_image, eval_transform, random_crop_box, train_transform
from megatron_atum.data.rng import Random
from megatron_atum.errors import DataError

SIZE = 56


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(mode: str, width: int = 90, height: int = 61) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


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


@pytest.mark.parametrize("name", sources())
def test_eval_equals_hugging_face(name: str):
    data = sources()[name]
    ours = eval_transform(decode_image(data, "here"), SIZE)
    theirs = IdeficsImageProcessorPil(image_size=SIZE)(Image.open(io.BytesIO(data)), return_tensors="pt")
    theirs = torch.as_tensor(theirs if isinstance(theirs, torch.Tensor) else theirs["pixel_values"])
    assert ours.dtype == torch.float32 and ours.shape == (3, SIZE, SIZE)
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-6)


def test_eval_equals_hugging_face_on_photographs(tiny: Path):
    for path in sorted((tiny / "photos").glob("*.jpg")):
        ours = eval_transform(decode_image(path.read_bytes(), "here"), 224)
        theirs = IdeficsImageProcessorPil()(Image.open(path), return_tensors="pt")
        theirs = torch.as_tensor(theirs if isinstance(theirs, torch.Tensor) else theirs["pixel_values"])
        torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=0, atol=1e-6)


def test_transparent_becomes_white():
    clear = decode_image(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG"), "here")
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_train_depends_on_its_numbers_only():
    image = noise("RGB", 80, 80)
    first = train_transform(image, SIZE, Random(1, "crop", 4, 0))
    assert first.shape == (3, SIZE, SIZE)
    assert torch.equal(first, train_transform(image, SIZE, Random(1, "crop", 4, 0)))
    assert not torch.equal(first, train_transform(image, SIZE, Random(1, "crop", 4, 1)))
    assert not torch.equal(first, eval_transform(image, SIZE))


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


@pytest.mark.parametrize("spoil", ["text", "half", "empty", "gif"])
def test_corrupt_bytes_name_the_sample(spoil: str):
    good = encode(noise("RGB"), "JPEG")
    data = {"text": b"not an image", "half": good[: len(good) // 2], "empty": b"", "gif": encode(noise("L"), "GIF")}
    with pytest.raises(DataError, match=r"shard a\.tar, key k7: image cannot be decoded"):
        decode_image(data[spoil], "shard a.tar, key k7")
