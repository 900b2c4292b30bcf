"""One image: upright, RGB, bounded, without metadata, or refused with a reason."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from megatron_atum.data.converters.reencode import ImageLimits, ImageProblem, reencode, stored_size
from tests.data.converters.files import ORIENTATION, decoded, encoded, jpeg, picture

LIMITS = ImageLimits(max_side=512)


def reason(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(ImageProblem) as problem:
        reencode(data, limits)
    return problem.value.reason


def difference(data: bytes, expected: Image.Image) -> float:
    image = decoded(data)
    assert image.mode == "RGB" and image.size == expected.size
    return float(np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_becomes_jpeg(kind: str) -> None:
    out = reencode(encoded(picture(), kind), LIMITS)
    assert decoded(out).format == "JPEG"
    assert difference(out, picture()) < (9 if kind == "GIF" else 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = picture().transpose(undo[orientation]) if orientation > 1 else picture()
    out = reencode(encoded(turned, kind, exif=exif), LIMITS)
    assert difference(out, picture()) < 3
    assert not decoded(out).getexif()


def test_a_large_image_is_made_smaller_by_bicubic_interpolation_and_a_small_one_is_left() -> None:
    limits = ImageLimits(max_side=64, quality=95)
    large = Image.effect_noise((300, 200), 60).convert("RGB")
    expected = large.resize((64, 43), Image.Resampling.BICUBIC)
    assert difference(reencode(encoded(large, "PNG"), ImageLimits(max_side=64, keep_png=True)), expected) == 0
    assert difference(reencode(encoded(picture(300, 200)), limits), picture(300, 200).resize((64, 43))) < 3
    assert decoded(reencode(jpeg(), limits)).size == (48, 32)
    assert stored_size(1000, 1, 100) == (100, 1)


def test_a_jpeg_decoded_at_a_fraction_looks_the_same() -> None:
    photo = picture(1600, 1200)
    full = photo.resize((64, 48), Image.Resampling.BICUBIC)
    assert difference(reencode(encoded(photo), ImageLimits(max_side=64)), full) < 3


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_put_on_white(kind: str) -> None:
    image = picture().convert("RGBA")
    image.putalpha(0)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert difference(reencode(encoded(image, kind, **options), LIMITS), Image.new("RGB", (48, 32), "white")) < 1


def test_transparent_colour_of_a_palette_is_put_on_white() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    data = encoded(image, "GIF", transparency=1)
    assert difference(reencode(data, LIMITS), Image.new("RGB", (32, 32), "white")) < 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "YCbCr"])
def test_modes(mode: str) -> None:
    kind = {"LA": "PNG", "P": "PNG", "1": "PNG"}.get(mode, "JPEG")
    out = decoded(reencode(encoded(picture().convert(mode), kind), LIMITS))
    assert out.mode == "RGB" and out.size == (48, 32)
    # Dark on the left, bright on the right, in colour and in grey.
    left, right = np.asarray(out, float)[:, :8].mean(), np.asarray(out, float)[:, -8:].mean()
    assert right > left + 30


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_shades(kind: str) -> None:
    grey = np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16)
    expected = Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    assert difference(reencode(encoded(Image.fromarray(grey), kind), LIMITS), expected) < 2


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_modes_without_a_range_are_refused(dtype: type) -> None:
    assert reason(encoded(Image.fromarray(np.ones((8, 8), dtype)), "TIFF")) == "unsupported_mode"


def test_metadata_is_dropped() -> None:
    exif = Image.Exif()
    exif[0x010E] = "secret words"
    data = encoded(picture(), "JPEG", exif=exif, icc_profile=b"secret profile", comment=b"secret remark")
    assert b"secret" in data
    for limits in (LIMITS, ImageLimits(keep_fitting=True)):
        assert b"secret" not in reencode(data, limits)
    png = encoded(picture(), "PNG", icc_profile=zlib.compress(b"x"))
    assert b"iCCP" in png and b"iCCP" not in reencode(png, ImageLimits(keep_png=True))


def test_keep_fitting_and_keep_png() -> None:
    fitting = ImageLimits(max_side=48, keep_fitting=True)
    assert reencode(jpeg(), fitting) == jpeg()
    assert reencode(jpeg(), ImageLimits(max_side=48)) != jpeg()
    assert reencode(jpeg(width=50), fitting) != jpeg(width=50)
    assert decoded(reencode(encoded(picture(), "PNG"), ImageLimits(keep_png=True))).format == "PNG"
    assert decoded(reencode(jpeg(), ImageLimits(keep_png=True))).format == "JPEG"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_an_image_that_is_cut_off_is_refused(kind: str) -> None:
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), kind)
    for share in (0.02, 0.5, 0.95):
        assert reason(data[: int(len(data) * share)]) == "corrupt_image"


def test_whoever_allows_cut_images_elsewhere_does_not_change_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"))
    assert reason(data[: len(data) // 2]) == "corrupt_image"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"<svg/>", bytes(100)])
def test_what_is_no_image(data: bytes) -> None:
    assert reason(data) == "not_an_image"


def test_sizes_out_of_bounds() -> None:
    assert reason(jpeg(), ImageLimits(max_bytes=100)) == "too_many_bytes"
    assert reason(jpeg(), ImageLimits(max_pixels=48 * 32 - 1)) == "too_many_pixels"
    assert reencode(jpeg(), ImageLimits(max_pixels=48 * 32))
    assert reason(encoded(Image.new("RGB", (2, 30)))) == "absurd_size"
    assert reason(encoded(Image.new("RGB", (410, 20)))) == "absurd_size"


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = header + zlib.crc32(header[12:]).to_bytes(4, "big") + encoded(picture(), "PNG")[33:]
    assert reason(bomb) == "too_many_pixels"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_cost_the_image() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert difference(reencode(data, LIMITS), picture()) < 3


def test_only_the_first_frame_counts() -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert difference(reencode(stream.getvalue(), LIMITS), frames[0]) < 3
