"""Decoding: JPEG bytes to the pixels of one image, stock and with `draft_side`, on one core.

The images are made up: smooth shapes, edges and a little noise, whose JPEGs have about the size of photographs'. The
steps are those of an evaluation, and of training but for the crop: decode, bicubic to a square, and with
`normalise_pixels` what the training process adds on a CPU. Differences are of the uint8 pixels after the resize, to
the stock path.

    python benchmarks/images.py            # table; one JSON object on the last line
    python benchmarks/images.py --quick    # fewer images and repeats
"""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, features

from megatron_atum.batch import normalise_pixels
from megatron_atum.data.images import decode_image, eval_pixels

SIDE = 224  # of the model
SIZES = {"small": (400, 300), "large": (2048, 1536)}
DRAFT_SIDES = {"stock": 0, "draft": 2 * SIDE}
QUALITY, NOISE = 90, 5  # of the JPEGs; grey levels
SEED = 7


def make_jpeg(width: int, height: int, random: np.random.Generator) -> bytes:
    """Detail at every scale, less of it at finer ones, as in photographs."""
    canvas = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells < max(width, height):
        rows = max(1, cells * height // width)
        layer = Image.fromarray(random.integers(0, 256, (rows, cells, 3), dtype=np.uint8))
        canvas += (np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) / cells**0.75
        cells *= 2
    canvas += random.normal(0, NOISE, canvas.shape).astype(np.float32)
    edge = random.integers(width // 4, width // 2)
    canvas[height // 3 : 2 * height // 3, edge : 2 * edge] *= -1
    stream = io.BytesIO()
    Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def pixels_of(data: bytes, draft_side: int) -> NDArray[np.uint8]:
    return eval_pixels(decode_image(data, draft_side), SIDE)


def cpu_ms(step: Callable[[], Any], repeats: int) -> float:
    """Least CPU time of a step over its repeats, after one to warm up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def measure(name: str, files: list[bytes], repeats: int) -> list[dict[str, Any]]:
    stock = [pixels_of(data, 0).astype(np.int16) for data in files]
    rows = []
    for path, side in DRAFT_SIDES.items():

        def decode(side: int = side) -> None:
            for data in files:
                decode_image(data, side)

        def whole(side: int = side) -> None:
            for data in files:
                pixels_of(data, side)

        away = np.abs(np.stack([pixels_of(data, side) for data in files]) - np.stack(stock))
        row = {"image": name, "path": path, "kb": round(sum(map(len, files)) / len(files) / 1e3, 1)}
        row["decode_ms"] = round(cpu_ms(decode, repeats) / len(files), 3)
        row["cpu_ms"] = round(cpu_ms(whole, repeats) / len(files), 3)
        row |= {"max_difference": int(away.max()), "mean_difference": round(float(away.mean()), 4)}
        rows.append(row)
    return rows


def normalise_ms(repeats: int) -> float:
    pixels = torch.randint(0, 256, (16, 3, SIDE, SIDE), dtype=torch.uint8)
    return cpu_ms(lambda: normalise_pixels(pixels), repeats) / len(pixels)


def print_table(rows: list[dict[str, Any]], normalise: float) -> None:
    print("image  path   file KB  decode ms  decode + resize ms  max difference  mean difference")
    for row in rows:
        print(
            f"{row['image']:5}  {row['path']:5}  {row['kb']:7.1f}  {row['decode_ms']:9.2f}  {row['cpu_ms']:18.2f}  "
            f"{row['max_difference']:14}  {row['mean_difference']:15.3f}"
        )
    print(f"normalise_pixels: {normalise:.2f} ms per image")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one image of each size, one repeat")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    images, repeats = (1, 1) if arguments.quick else (3, 8)
    random = np.random.default_rng(SEED)
    rows = []
    for name, size in SIZES.items():
        files = [make_jpeg(*size, random) for _ in range(images)]
        rows += measure(name, files, repeats)
    normalise = normalise_ms(repeats)
    print_table(rows, normalise)
    report = {
        "rows": rows,
        "normalise_ms": round(normalise, 3),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "cores": os.cpu_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
