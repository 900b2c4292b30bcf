from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from megatron_atum.data.shards import DocumentRecord, PairRecord, image_suffix, read_shard, write_shard
from megatron_atum.errors import DataError


def document(jpeg: bytes, key: str = "doc-1") -> DocumentRecord:
    return DocumentRecord(key, ["a", None, "b", None], [None, jpeg, None, None], "web", {3: "404"}, {"url": "x"})


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_document_layout(tmp_path: Path, jpeg: bytes) -> None:
    path = tmp_path / "a.tar"
    assert write_shard(path, [document(jpeg), document(jpeg, "doc-2")]) == 2
    assert members(path) == ["doc-1.json", "doc-1.000.jpg", "doc-2.json", "doc-2.000.jpg"]
    (key, content), _ = read_shard(str(path))
    assert key == "doc-1" and content["000.jpg"] == jpeg
    assert content["json"] == (
        b'{"version":1,"source":"web","texts":["a",null,"b",null],"images":[null,"000.jpg",null,""],'
        b'"missing":{"3":"404"},"meta":{"url":"x"}}'
    )


def test_pair_layout(tmp_path: Path, jpeg: bytes) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [PairRecord("k1", jpeg, "café"), PairRecord("k2", jpeg, "b", {"status": "success"})])
    assert members(path) == ["k1.jpg", "k1.txt", "k2.jpg", "k2.txt", "k2.json"]
    content = dict(read_shard(path))
    assert content["k1"] == {"jpg": jpeg, "txt": "café".encode()}


def test_webdataset_reads_the_same_bytes(tmp_path: Path, jpeg: bytes) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [document(jpeg, f"d{i}") for i in range(3)])
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    ours = list(read_shard(str(path)))
    assert [(s["__key__"], s["json"], s["000.jpg"]) for s in theirs] == [(k, c["json"], c["000.jpg"]) for k, c in ours]
    assert len(theirs) == 3


def test_same_records_same_bytes(tmp_path: Path, jpeg: bytes) -> None:
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [document(jpeg)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_failed_write_leaves_nothing(tmp_path: Path, jpeg: bytes) -> None:
    with pytest.raises(DataError, match="used twice"):
        write_shard(tmp_path / "a.tar", [document(jpeg), document(jpeg)])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_what_was_there(tmp_path: Path, jpeg: bytes) -> None:
    path = tmp_path / "a.tar"
    write_shard(path, [document(jpeg)])
    before = path.read_bytes()
    with pytest.raises(DataError, match="dot"):
        write_shard(path, [document(jpeg, "bad.key")])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (PairRecord("k", b"GIF89a", "t"), "neither JPEG, PNG nor WebP"),
        (DocumentRecord("k", [None], [None]), "place 0 needs exactly one"),
        (DocumentRecord("k", ["a"], [None], missing={0: "404"}), "place 0 needs exactly one"),
        (DocumentRecord("k", ["a"], [b"\xff\xd8\xff"]), "place 0 needs exactly one"),
        (PairRecord("", b"\xff\xd8\xff", "t"), "must not be empty"),
        (PairRecord("__key__", b"\xff\xd8\xff", "t"), "start with an underscore"),
    ],
)
def test_records_that_cannot_be_written(tmp_path: Path, record: DocumentRecord | PairRecord, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.tar", [record])


@pytest.mark.parametrize(("format", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WebP", "webp")])
def test_suffix_by_content(format: str, suffix: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format)
    assert image_suffix(stream.getvalue(), "x") == suffix


def test_reading_a_damaged_shard(tmp_path: Path, jpeg: bytes) -> None:
    """Complete samples come first, then the damage."""
    path = tmp_path / "a.tar"
    write_shard(path, [PairRecord(f"k{i}", jpeg, "t") for i in range(3)])
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"k2.txt") + 512])
    found = []
    with pytest.raises(DataError, match=r"shard .*a\.tar is cut off or damaged at byte \d+ of \d+; copy or write it"):
        for sample in read_shard(path):
            found.append(sample)
    assert found == [("k0", {"jpg": jpeg, "txt": b"t"}), ("k1", {"jpg": jpeg, "txt": b"t"})]


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.tar does not exist"):
        list(read_shard(tmp_path / "b.tar"))
