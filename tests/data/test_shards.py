import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from megatron_atum.data import shards
from megatron_atum.data.shards import DocumentRecord, PairRecord, ShardReader, read_shard, scan_shard, write_shard
from megatron_atum.errors import DataError


def document(jpeg: bytes, key: str = "doc-1") -> DocumentRecord:
    return DocumentRecord(key, ["a", None, "b", None], [None, jpeg, None, None], "web", {3: "404"}, {"url": "x"})


def members(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_document_layout(tmp_path: Path, jpeg: bytes):
    path = tmp_path / "a.tar"
    assert write_shard(path, [document(jpeg), document(jpeg, "doc-2")]) == 2
    assert members(path) == ["doc-1.json", "doc-1.000.jpg", "doc-2.json", "doc-2.000.jpg"]
    (key, content), _ = read_shard(str(path))
    assert key == "doc-1" and content["000.jpg"] == jpeg
    assert content["json"] == (
        b'{"version":1,"source":"web","texts":["a",null,"b",null],"images":[null,"000.jpg",null,""],'
        b'"missing":{"3":"404"},"meta":{"url":"x"}}'
    )


def test_pair_layout(tmp_path: Path, jpeg: bytes):
    path = tmp_path / "a.tar"
    write_shard(path, [PairRecord("k1", jpeg, "café"), PairRecord("k2", jpeg, "b", {"status": "success"})])
    assert members(path) == ["k1.jpg", "k1.txt", "k2.jpg", "k2.txt", "k2.json"]
    content = dict(read_shard(str(path)))
    assert content["k1"] == {"jpg": jpeg, "txt": "café".encode()}


def test_webdataset_reads_the_same_bytes(tmp_path: Path, jpeg: bytes):
    path = tmp_path / "a.tar"
    write_shard(path, [document(jpeg, f"d{i}") for i in range(3)])
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    ours = list(read_shard(str(path)))
    assert [(s["__key__"], s["json"], s["000.jpg"]) for s in theirs] == [(k, c["json"], c["000.jpg"]) for k, c in ours]


def test_same_records_same_bytes(tmp_path: Path, jpeg: bytes):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [document(jpeg)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_failed_write_leaves_nothing(tmp_path: Path, jpeg: bytes):
    with pytest.raises(DataError, match="used twice"):
        write_shard(tmp_path / "a.tar", [document(jpeg), document(jpeg)])
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_what_was_there(tmp_path: Path, jpeg: bytes):
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
        (PairRecord("", b"\xff\xd8\xff", "t"), "must not be empty"),
    ],
)
def test_records_that_cannot_be_written(tmp_path: Path, record: DocumentRecord | PairRecord, message: str):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.tar", [record])


def test_cut_anywhere_is_noticed(tmp_path: Path, jpeg: bytes):
    whole = tmp_path / "whole.tar"
    write_shard(whole, [PairRecord(f"k{i}", jpeg, "t") for i in range(3)])
    data = whole.read_bytes()
    last = max(m.offset + m.size for s in scan_shard(str(whole)) for m in s.members.values())
    cut = tmp_path / "cut.tar"
    for size in [0, 100, 512, 600, 1024, *range(1536, last + 600, 97)]:
        cut.write_bytes(data[:size])
        if size >= -(-last // 512) * 512 + 512:
            continue  # nothing but padding is lost
        with pytest.raises(DataError, match=r"shard .*cut\.tar is .*(copy|write) it again"):
            list(scan_shard(str(cut)))


def test_damaged_header_is_noticed(tmp_path: Path, jpeg: bytes):
    path = tmp_path / "a.tar"
    write_shard(path, [PairRecord(f"k{i}", jpeg, "t") for i in range(3)])
    second = list(scan_shard(str(path)))[1].members["jpg"].offset
    data = bytearray(path.read_bytes())
    data[second - 512 : second - 500] = b"\xff" * 12
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar is damaged or cut off"):
        list(scan_shard(str(path)))


def test_compressed_or_missing_shard(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("k.txt"), io.BytesIO())
    with pytest.raises(DataError, match="no complete uncompressed tar"):
        list(scan_shard(str(tmp_path / "a.tar")))
    with pytest.raises(DataError, match=r"b\.tar does not exist"):
        list(scan_shard(str(tmp_path / "b.tar")))


def test_pattern_without_shards(tmp_path: Path):
    with pytest.raises(DataError, match=r"no shard matches .*\*\.tar"):
        shards.expand_shards(str(tmp_path / "*.tar"))
    with pytest.raises(DataError, match="manifests cannot be read yet"):
        shards.expand_shards("set.json")


def test_shards_are_sorted(tmp_path: Path):
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).touch()
    assert [Path(p).name for p in shards.expand_shards(str(tmp_path / "*.tar"))] == ["a.tar", "b.tar"]


def test_keys_may_lie_in_folders(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("d.x/k1.txt", "d.x/k1.jpg", "d.x/k2.000.jpg", "README"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    found = [(sample.key, list(sample.members)) for sample in scan_shard(str(path))]
    assert found == [("d.x/k1", ["txt", "jpg"]), ("d.x/k2", ["000.jpg"]), ("README", [""])]


def test_reader_keeps_few_files_open(tmp_path: Path, jpeg: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    paths = [str(tmp_path / f"{i}.tar") for i in range(4)]
    for i, path in enumerate(paths):
        write_shard(path, [PairRecord("k", jpeg, f"text {i}")])
    places = [next(iter(scan_shard(path))).members["txt"] for path in paths]
    reader = ShardReader()
    for _ in range(2):
        assert [reader.read(p, m) for p, m in zip(paths, places, strict=True)] == [b"text %d" % i for i in range(4)]
        assert len(reader._files) <= 2
    reader.close()


def test_reader_notices_a_shard_that_shrank(tmp_path: Path, jpeg: bytes):
    path = tmp_path / "a.tar"
    write_shard(path, [PairRecord("k", jpeg, "text")])
    member = next(iter(scan_shard(str(path)))).members["txt"]
    path.write_bytes(path.read_bytes()[: member.offset + 1])
    with pytest.raises(DataError, match=r"a\.tar ends before byte"):
        ShardReader().read(str(path), member)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        ShardReader().read(str(path), member)
