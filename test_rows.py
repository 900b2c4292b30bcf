"""Rows of all kinds of files, and what is said about bad ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_atum.data.converters.rows import BATCH_ROWS, read_rows
from megatron_atum.errors import DataError
from tests.data.converters.files import Row, write_arrow, write_jsonl, write_parquet

ROWS: list[Row] = [
    {"image_url": f"u{i}", "image": {"bytes": bytes([i % 256]) * 9, "path": None}, "text": f"t{i}", "source": "s"}
    for i in range(2 * BATCH_ROWS + 3)
]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables(tmp_path: Path, kind: str) -> None:
    if kind == "parquet":
        path = write_parquet(tmp_path / "a.parquet", ROWS, "pmd")
    else:
        path = write_arrow(tmp_path / "a.arrow", ROWS, "pmd", stream=kind == "stream")
    got = list(read_rows(str(path), ("image", "text"), ("source", "not_there")))
    assert got == [(i, {name: row[name] for name in ("image", "text", "source")}) for i, row in enumerate(ROWS)]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    lines = ['{"a": 1}', "", "[1]", "{broken", '"\\ud800"', "[" * 5000, '{"b": "\\u00e9"}']
    expected = [(0, {"a": 1}), (1, None), (2, None), (3, None), (4, None), (5, {"b": "é"})]
    path = write_jsonl(tmp_path / "a.jsonl", lines)
    assert list(read_rows(str(path), ())) == expected
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_rows(str(tmp_path / "a.jsonl.gz"), ())) == expected


def test_a_file_that_ends_too_early_is_named_with_the_row(tmp_path: Path) -> None:
    content = gzip.compress("".join(json.dumps({"a": i}) + "\n" for i in range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be read behind row \d+"):
        list(read_rows(str(tmp_path / "a.jsonl.gz"), ()))
    parquet = write_parquet(tmp_path / "b.parquet", ROWS, "pmd")
    arrow = write_arrow(tmp_path / "c.arrow", ROWS, "pmd")
    for path in (parquet, arrow):
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(DataError, match=path.name):
            list(read_rows(str(path), ("text",)))


def test_a_damaged_page_is_named_with_the_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS, "pmd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(DataError, match="a.parquet cannot be read"):
        list(read_rows(str(path), ("image", "text", "image_url"), ("source", "meta")))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_is_no_table(tmp_path: Path, name: str) -> None:
    for content in (b"", b"<html>"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            list(read_rows(str(tmp_path / name), ("text",)))


def test_a_missing_column_and_an_unknown_kind_are_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS[:1], "pmd")
    with pytest.raises(DataError, match="no column texts, images; it has image_url, image, text"):
        list(read_rows(str(path), ("texts", "images", "text")))
    with pytest.raises(DataError, match="unknown kind of file"):
        list(read_rows(str(tmp_path / "a.csv"), ()))
