"""The local image store, and fetchers of others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron_atum.data.converters.fetch import FetchSpec, StoreFetcher, make_fetcher, read_inside, store_stem
from megatron_atum.data.converters.reencode import ImageProblem
from megatron_atum.errors import AtumError, ConfigError, DataError
from tests.data.converters.files import write_jsonl, write_store

URL = "http://a.example/cat.jpg"


def test_a_store_is_addressed_by_the_sha256_of_the_url(tmp_path: Path) -> None:
    write_store(tmp_path, {URL: b"cat"})
    fetcher = StoreFetcher(str(tmp_path))
    assert fetcher.fetch(URL) == b"cat"
    assert store_stem("a") == "ca/97/ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    with pytest.raises(ImageProblem, match=r"^not_in_store$"):
        fetcher.fetch("http://a.example/dog.jpg")
    with pytest.raises(ImageProblem, match=r"^not_in_store$"):
        fetcher.fetch("http://a.example/\ud800")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_store_with_an_index(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"cat")
    rows = [{"url": URL, "path": "images/1.jpg"}, {"url": "http://b.example", "path": "images/2.jpg"}]
    index = tmp_path / f"index.{suffix}"
    if suffix == "jsonl":
        write_jsonl(index, rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), index)
    fetcher = StoreFetcher(str(tmp_path), str(index))
    assert fetcher.fetch(URL) == b"cat"
    for url, reason in (("http://b.example", "no_such_file"), ("http://c.example", "not_in_store")):
        with pytest.raises(ImageProblem, match=f"^{reason}$"):
            fetcher.fetch(url)


def test_an_index_with_a_bad_row_is_named(tmp_path: Path) -> None:
    index = write_jsonl(tmp_path / "index.jsonl", [{"url": URL, "path": "x"}, {"url": URL}])
    with pytest.raises(DataError, match=r"index\.jsonl, row 1"):
        StoreFetcher(str(tmp_path), str(index))


def test_nothing_outside_a_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "in-beside").mkdir()
    (tmp_path / "in-beside" / "x").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "ok").write_bytes(b"fine")
    assert read_inside(str(folder), "ok", 10) == b"fine"
    for path in ("../secret", "link", str(tmp_path / "secret"), "../in-beside/x", "/etc/passwd"):
        with pytest.raises(ImageProblem, match=r"^path_outside$"):
            read_inside(str(folder), path, 10)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(bytes(11))
    os.mkfifo(tmp_path / "pipe")
    cases = {"long": "too_many_bytes", "none": "no_such_file", ".": "no_such_file", "pipe": "no_such_file"}
    for path, reason in {**cases, "a\0b": "unreadable_file", "\ud800": "unreadable_file"}.items():
        with pytest.raises(ImageProblem, match=f"^{reason}$"):
            read_inside(str(tmp_path), path, 10)


def test_a_fetcher_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_fetchers.py").write_text(
        "class Upper:\n"
        "    def __init__(self, word): self.word = word\n"
        "    def fetch(self, url): return (self.word + url).encode()\n"
        "def broken(): raise KeyError('no credentials')\n"
        "def nothing(): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_fetchers", raising=False)
    fetcher = make_fetcher(FetchSpec("my_fetchers:Upper", options={"word": "X"}))
    assert fetcher is not None and fetcher.fetch("u") == b"Xu"
    messages = {
        "my_fetchers:broken": "KeyError: 'no credentials'",
        "my_fetchers:nothing": "no method fetch",
        "my_fetchers:missing": "cannot be imported",
        "no_such_module:x": "PYTHONPATH",
        "htpp": "is not http, store or",
    }
    for kind, message in messages.items():
        with pytest.raises(ConfigError, match=message):
            make_fetcher(FetchSpec(kind))
    with pytest.raises(AtumError, match="--store"):
        make_fetcher(FetchSpec("store", store=str(tmp_path / "none")))
    assert make_fetcher(FetchSpec()) is None
