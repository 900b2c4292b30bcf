"""Rows of parquet, Arrow, JSONL and JSON files, one after the other; all but JSON in bounded memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, cast

from megatron_atum.errors import ConfigError, DataError

PARQUET, ARROW, JSONL = (".parquet",), (".arrow",), (".jsonl", ".jsonl.gz", ".json.gz", ".ndjson", ".ndjson.gz")
JSON = (".json",)  # one list of objects; or, as many call it, JSONL
_LISTS = (".json", ".json.gz")
_BOM = b"\xef\xbb\xbf"
ROW_SUFFIXES = PARQUET + ARROW + JSONL
BATCH_ROWS = 128  # with the images in the rows, some ten megabytes

Row = dict[str, Any]


def read_rows(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, Row | None]]:
    """(number from 0, row) of a file. The row is None for a line of JSONL that is no JSON object.

    Args:
        path: its suffix says what it is.
        columns: what a table must have; other columns are not read. A JSONL row comes as it is.
        optional: columns that are read where they exist.

    Raises:
        DataError: a missing, damaged or unknown file, a table without these columns. Names the row it came to.
        ConfigError: pyarrow is needed and not installed.
    """
    number = 0
    try:
        for row in _reader(path)(path, columns, optional):
            yield number, row
            number += 1
    except (OSError, EOFError, ValueError, KeyError, TypeError, NotImplementedError, zlib.error) as error:
        # pyarrow's errors are all of these kinds
        place = f" behind row {number - 1}" if number else ""
        raise DataError(f"{path} cannot be read{place} ({error}); copy or download it again") from error


def _reader(path: str) -> Any:
    name = path.lower()
    readers = ((PARQUET, _parquet_rows), (ARROW, _arrow_rows), (_LISTS, _json_rows), (JSONL, _jsonl_rows))
    for suffixes, reader in readers:
        if name.endswith(suffixes):
            return reader
    raise DataError(f"{path}: unknown kind of file; use {', '.join(ROW_SUFFIXES)}")


def _parquet_rows(path: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    with _pyarrow("pyarrow.parquet").ParquetFile(path) as table:
        wanted = _wanted(path, table.schema_arrow.names, columns, optional)
        for batch in table.iter_batches(BATCH_ROWS, columns=wanted):
            yield from batch.to_pylist()


def _arrow_rows(path: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """Both forms of Arrow IPC: `datasets` writes streams, other programs write files."""
    arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
    with arrow.memory_map(path) as source:
        try:
            opened = ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        except arrow.ArrowInvalid:
            source.seek(0)
            opened = ipc.open_stream(source)
            batches = iter(opened)
        wanted = _wanted(path, opened.schema.names, columns, optional)
        for batch in batches:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield from batch.select(wanted).slice(start, BATCH_ROWS).to_pylist()


def _jsonl_rows(path: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row | None]:
    del columns, optional  # a line may lack any key, and who reads it counts that
    with _opened(path) as stream:
        yield from _json_objects(stream)


def _json_rows(path: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row | None]:
    del columns, optional
    with _opened(path) as stream:
        is_list = _first_sign(stream) == b"["
        stream.seek(0)
        if not is_list:
            yield from _json_objects(stream)
            return
        for value in _json_list(stream):
            yield value if isinstance(value, dict) else None


def _opened(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.lower().endswith(".gz") else open(path, "rb")


def _first_sign(stream: IO[bytes]) -> bytes:
    """The first byte that is neither white space nor part of a byte order mark; b"" at the end."""
    if stream.read(len(_BOM)) != _BOM:
        stream.seek(0)
    sign = stream.read(1)
    while sign.isspace():
        sign = stream.read(1)
    return sign


def _json_list(stream: IO[bytes]) -> list[Any]:
    try:
        values: list[Any] = json.load(stream)
        return values
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _json_objects(lines: Iterable[bytes]) -> Iterator[Row | None]:
    for line in lines:
        if line.strip():
            yield _json_object(line)


def _json_object(line: bytes) -> Row | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _wanted(path: str, names: Sequence[str], columns: Sequence[str], optional: Sequence[str]) -> list[str]:
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return [*columns, *(name for name in optional if name in names)]


def _pyarrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError("parquet and Arrow files need pyarrow; pip install pyarrow") from error
