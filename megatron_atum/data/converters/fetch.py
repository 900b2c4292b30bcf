"""Where the bytes of an image come from: a pluggable fetcher of URLs, or a local image store."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_atum.data.converters.http_fetcher import HttpFetcher, HttpOptions
from megatron_atum.data.converters.reencode import ImageProblem
from megatron_atum.data.converters.rows import read_rows
from megatron_atum.errors import AtumError, ConfigError, DataError

STORE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", "")


class Fetcher(Protocol):
    """Bytes of an image by its URL. Called by many threads at once."""

    def fetch(self, url: str) -> bytes:
        """Raises FetchProblem when there is no image; any other exception ends the conversion."""
        ...


class StoreFetcher:
    """Images that lie in a folder already, by `aa/bb/SHA.suffix` (the sha256 of the URL) or by an index.

    Args:
        folder: the store; nothing outside of it is read.
        index: JSONL or parquet with the columns `url` and `path` (relative to the folder), held in memory.
        max_bytes: of a file.
    """

    def __init__(self, folder: str, index: str | None = None, max_bytes: int = 20_000_000) -> None:
        if not os.path.isdir(folder):
            raise DataError(f"image store {folder} is no folder; correct --store")
        self._folder, self._max_bytes = folder, max_bytes
        self._index = None if index is None else _read_index(index)

    def fetch(self, url: str) -> bytes:
        return read_inside(self._folder, self._path(url), self._max_bytes)

    def _path(self, url: str) -> str:
        if self._index is not None:
            if url not in self._index:
                raise ImageProblem("not_in_store")
            return self._index[url]
        stem = store_stem(url)
        for suffix in STORE_SUFFIXES:
            if os.path.lexists(os.path.join(self._folder, stem + suffix)):
                return stem + suffix
        raise ImageProblem("not_in_store")


def store_stem(url: str) -> str:
    """Path of a URL's image in a store without an index, without its suffix."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{digest[:2]}/{digest[2:4]}/{digest}"


def read_inside(folder: str, path: str, max_bytes: int) -> bytes:
    """Content of a file below a folder, links followed.

    Raises:
        ImageProblem: path_outside, no_such_file, unreadable_file, too_many_bytes.
    """
    try:
        root, real = os.path.realpath(folder), os.path.realpath(os.path.join(folder, path))
        if os.path.commonpath([root, real]) != root:
            raise ImageProblem("path_outside")
        if not os.path.isfile(real):
            raise ImageProblem("no_such_file")
        if os.path.getsize(real) > max_bytes:
            raise ImageProblem("too_many_bytes")
        with open(real, "rb") as stream:
            return stream.read()
    except (OSError, ValueError) as error:  # ValueError: a zero byte or half a surrogate pair in the path
        raise ImageProblem("unreadable_file") from error


@dataclass(frozen=True)
class FetchSpec:
    """Which fetcher, in a form that can be sent to another process.

    `kind` is "none", "http", "store" or `package.module:factory`, which is called with `options` by keyword.
    """

    kind: str = "none"
    http: HttpOptions = field(default_factory=HttpOptions)
    store: str = ""
    index: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def make_fetcher(spec: FetchSpec) -> Fetcher | None:
    """Raises ConfigError or DataError when it cannot be made."""
    if spec.kind == "none":
        return None
    if spec.kind == "http":
        return HttpFetcher(spec.http)
    if spec.kind == "store":
        return StoreFetcher(spec.store, spec.index, spec.http.max_bytes)
    fetcher = _call_factory(spec)
    if not callable(getattr(fetcher, "fetch", None)):
        raise ConfigError(f"--fetcher {spec.kind}: what it returns has no method fetch(url); see docs/convert.md")
    return fetcher


def _call_factory(spec: FetchSpec) -> Any:
    module, colon, name = spec.kind.partition(":")
    if not colon:
        raise ConfigError(f"--fetcher {spec.kind} is not http, store or package.module:factory")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--fetcher {spec.kind} cannot be imported ({error}); is it on PYTHONPATH?") from error
    try:
        return factory(**spec.options)
    except AtumError:
        raise
    except Exception as error:
        raise ConfigError(f"--fetcher {spec.kind}({dict(spec.options)}): {type(error).__name__}: {error}") from error


def _read_index(path: str) -> dict[str, str]:
    index: dict[str, str] = {}
    for number, row in read_rows(path, ("url", "path")):
        if row is None or not isinstance(row.get("url"), str) or not isinstance(row.get("path"), str):
            raise DataError(f"{path}, row {number}: no url and path as texts ({json.dumps(row, default=str)[:80]})")
        index[row["url"]] = row["path"]
    return index
