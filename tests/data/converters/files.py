"""Small real files of every kind that a converter reads."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Row = dict[str, Any]
ORIENTATION = 0x0112
EMBEDDED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMAS = {
    "obelics": pa.schema(
        [
            ("images", pa.list_(pa.string())),
            ("metadata", pa.string()),
            ("general_metadata", pa.string()),
            ("texts", pa.list_(pa.string())),
        ]
    ),
    "pmd": pa.schema(
        [
            ("image_url", pa.string()),
            ("image", EMBEDDED),
            ("text", pa.string()),
            ("source", pa.string()),
            ("meta", pa.string()),
        ]
    ),
}


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth picture without symmetry: red grows to the right, green to the bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, seed * 37 % 256)], axis=2).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def jpeg(seed: int = 0, width: int = 48, height: int = 32) -> bytes:
    return encoded(picture(width, height, seed))


def obelics_row(texts: list[str | None], images: list[str | None], **changes: Any) -> Row:
    places = [None if url is None else {"src": url} for url in images]
    row = {"images": images, "texts": texts, "metadata": json.dumps(places)}
    return {**row, "general_metadata": json.dumps({"url": "http://page.example/1", "warc_record_length": 9}), **changes}


def write_parquet(path: Path, rows: list[Row], kind: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMAS[kind]), path, row_group_size=16)
    return path


def write_arrow(path: Path, rows: list[Row], kind: str, stream: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=SCHEMAS[kind])
    maker = pa.ipc.new_stream if stream else pa.ipc.new_file
    with maker(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]], stats: Row | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    if stats is not None:
        path.with_name(path.stem + "_stats.json").write_text(json.dumps(stats))
    return path


def laion_members(key: str, seed: int = 0, caption: str = "a picture", **facts: Any) -> list[tuple[str, bytes]]:
    meta = {"url": f"http://x.example/{key}.jpg", "caption": caption, "key": key, "status": "success", "exif": "{}"}
    meta |= {"error_message": None, "sha256": "0" * 64, "width": 48, "original_width": 480, **facts}
    return [(f"{key}.jpg", jpeg(seed)), (f"{key}.txt", caption.encode()), (f"{key}.json", json.dumps(meta).encode())]


def write_store(folder: Path, images: dict[str, bytes]) -> Path:
    """A local image store: aa/bb/SHA256.jpg."""
    from megatron_atum.data.converters.fetch import store_stem

    for url, content in images.items():
        path = folder / (store_stem(url) + ".jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
