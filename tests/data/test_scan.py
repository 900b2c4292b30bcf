"""One pass over a tar: what it holds, and how far a damaged one can be used."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.data import scan
from megatron_atum.data.scan import BLOCK, ShardScan, StoredSample
from megatron_atum.data.shards import PairRecord, write_shard
from megatron_atum.data.storage import MissingFile, Storage
from megatron_atum.errors import DataError
from tests.data.conftest import write_members

PAIR = (("k1.jpg", b"J" * 1300), ("k1.txt", b"one"), ("k2.jpg", b"K" * 10), ("k2.txt", b"two"))
TEXT = b"text" * 150
LONG = "d" * 120 + "/" + "é" * 60


def scanned(path: Path, whole: bool = False) -> tuple[list[StoredSample], ShardScan]:
    one = ShardScan(Storage(), str(path), whole=whole)
    return list(one), one


def names(samples: list[StoredSample]) -> list[tuple[str, list[str]]]:
    return [(sample.key, list(sample.members)) for sample in samples]


def member_ends(data: bytes) -> list[int]:
    """Where the blocks of each member end; the first is 0."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [0, *(info.offset_data + -(-info.size // BLOCK) * BLOCK for info in tar)]


def content_end(data: bytes, member: int) -> int:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        info = tar.getmembers()[member]
        return info.offset_data + info.size


def kept(samples: list[StoredSample], size: int) -> list[str]:
    """The key of each member that is complete in so many bytes."""
    return [sample.key for sample in samples for m in sample.members.values() if m.offset + m.size <= size]


@pytest.mark.parametrize("whole", [False, True])
def test_samples_and_places(tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "a.tar"
    write_members(path, *PAIR)
    samples, found = scanned(path, whole)
    data = path.read_bytes()
    assert names(samples) == [("k1", ["jpg", "txt"]), ("k2", ["jpg", "txt"])]
    contents = [data[m.offset : m.offset + m.size] for sample in samples for m in sample.members.values()]
    assert contents == [content for _, content in PAIR]
    assert [sample.texts for sample in samples] == [{"txt": b"one"}, {"txt": b"two"}]
    assert not any(sample.bad_name or sample.cut_off for sample in samples)
    assert (found.damage, found.size) == ("", len(data))
    assert found.sha256 == (hashlib.sha256(data).hexdigest() if whole else "")


def test_hash_is_that_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the padding, which no one reads."""
    monkeypatch.setattr(scan, "_READ_AT_ONCE", BLOCK)
    write_members(tmp_path / "a.tar", *PAIR)
    _, found = scanned(tmp_path / "a.tar", whole=True)
    assert found.sha256 == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("whole", [False, True])
def test_long_names(tmp_path: Path, format: int, whole: bool) -> None:
    path = tmp_path / "a.tar"
    write_members(path, (f"{LONG}.jpg", b"J" * 600), (f"{LONG}.txt", b"one"), ("k.txt", b"two"), format=format)
    samples, found = scanned(path, whole)
    assert names(samples) == [(LONG, ["jpg", "txt"]), ("k", ["txt"])]
    assert samples[0].texts == {"txt": b"one"} and found.damage == ""


def test_keys_may_lie_in_folders(tmp_path: Path) -> None:
    members = ("d.x/k1.txt", "d.x/k1.jpg", "./k2.000.jpg", "e/k2.txt", "d.x/k1.txt", "dir/README", ".hidden", "k.")
    write_members(tmp_path / "a.tar", *((name, b"") for name in members))
    samples, _ = scanned(tmp_path / "a.tar")
    assert names(samples) == [
        *(("d.x/k1", ["txt", "jpg"]), ("./k2", ["000.jpg"]), ("e/k2", ["txt"])),
        *(("d.x/k1", ["txt"]), ("dir/README", [""]), (".hidden", [""]), ("k.", [""])),
    ]
    assert [sample.bad_name for sample in samples] == [False] * 4 + [True] * 3


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg", "/a/x.000.jpg", "README", "a.b/c"])
def test_names_that_are_refused(tmp_path: Path, name: str) -> None:
    write_members(tmp_path / "a.tar", ("a.txt", b"a"), (name, b"x"), ("b.txt", b"b"))
    samples, _ = scanned(tmp_path / "a.tar")
    assert [sample.bad_name for sample in samples] == [False, True, False]


def test_folders_are_passed_over_and_links_have_no_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/k.txt", tarfile.SYMTYPE), ("d/k.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "../../secret"
            tar.addfile(info)
    samples, found = scanned(tmp_path / "a.tar")
    assert names(samples) == [("d/k", ["txt", "jpg"])] and samples[0].texts == {} and found.damage == ""


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", ("k.JPG", b"J"), ("k.TXT", b"t"), ("k.WebP", b"W"), ("k.cls", b"1"))
    ((sample,), _) = scanned(tmp_path / "a.tar")
    assert sample.image_names() == ["JPG", "WebP"] and sample.texts == {"TXT": b"t"}


def test_text_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_TEXT_BYTES", 10)
    write_members(tmp_path / "a.tar", ("a.txt", b"x" * 10), ("b.txt", b"x" * 11), ("b.json", b"{}"))
    samples, found = scanned(tmp_path / "a.tar")
    assert [sample.texts for sample in samples] == [{"txt": b"x" * 10}, {"json": b"{}"}]
    assert list(samples[1].members) == ["txt", "json"] and found.damage == ""


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("é.txt"), io.BytesIO())
    ((sample,), _) = scanned(tmp_path / "a.tar")
    assert sample.key == "\udce9"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_cut_anywhere(tmp_path: Path, format: int, whole: bool) -> None:
    """What is complete is kept; the rest of the sample at the cut is told apart; the damage is told."""
    path, cut = tmp_path / "a.tar", tmp_path / "cut.tar"
    write_members(path, *PAIR, (f"{LONG}.jpg", b"J" * 5), (f"{LONG}.txt", TEXT), format=format)
    data = path.read_bytes()
    ends = member_ends(data)
    keys, contents = ["k1", "k1", "k2", "k2", LONG, LONG], [content_end(data, member) for member in range(6)]
    places = {*range(BLOCK, ends[-1] + BLOCK, BLOCK), *(end + step for end in contents for step in (-1, 0, 1))}
    places |= set(range(1, BLOCK, 100)) | {end + step for end in ends[1:] for step in (1, 100, 511)}
    for size in sorted(places):
        cut.write_bytes(data[:size])
        if size < BLOCK:
            with pytest.raises(DataError, match=r"cut\.tar is no uncompressed tar"):
                scanned(cut, whole)
            continue
        samples, found = scanned(cut, whole)
        complete = [number for number, end in enumerate(contents) if end <= size]
        assert kept(samples, size) == [keys[number] for number in complete], size
        texts = [text for number, text in ((1, b"one"), (3, b"two"), (5, TEXT)) if number in complete]
        assert [sample.texts["txt"] for sample in samples if sample.texts] == texts, size
        assert not any(sample.cut_off for sample in samples[:-1])
        assert found.damage.startswith("cut off or damaged at byte") == (size < ends[-1] + BLOCK), size
        assert found.sha256 == (hashlib.sha256(data[:size]).hexdigest() if whole else "")


@pytest.mark.parametrize("whole", [False, True])
def test_damaged_header_in_the_middle(tmp_path: Path, whole: bool) -> None:
    path = tmp_path / "a.tar"
    write_members(path, *PAIR)
    data = bytearray(path.read_bytes())
    second = member_ends(data)[2]
    for place in (second, second + 130, second + 150, second + 300):
        path.write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
        samples, found = scanned(path, whole)
        assert names(samples) == [("k1", ["jpg", "txt"])]
        assert found.damage == f"cut off or damaged at byte {second} of {len(data)}"


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("whole", [False, True])
def test_compressed(tmp_path: Path, mode: str, whole: bool) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        tar.addfile(tarfile.TarInfo("k.txt"), io.BytesIO())
    with pytest.raises(DataError, match=r"a\.tar is no uncompressed tar .*; copy or write it again"):
        scanned(tmp_path / "a.tar", whole)


@pytest.mark.parametrize("content", [b"", b"a text\n", b"x" * 5000, b"\xff" * 600], ids=["empty", "text", "x", "ff"])
@pytest.mark.parametrize("whole", [False, True])
def test_no_tar(tmp_path: Path, content: bytes, whole: bool) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar is no uncompressed tar"):
        scanned(tmp_path / "a.tar", whole)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"a\.tar does not exist"):
        scanned(tmp_path / "a.tar")


def test_tar_without_members(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar")
    samples, found = scanned(tmp_path / "a.tar")
    assert (samples, found.damage) == ([], "")


def with_size(data: bytes, header: int, size: bytes) -> bytes:
    """Another size in a header, with the checksum that fits."""
    block = bytearray(data[header : header + BLOCK])
    block[124:136], block[148:156] = size, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return data[:header] + bytes(block) + data[header + BLOCK :]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "size",
    [b"\xff" * 11 + b"\x00", b"\xff" * 10 + b"\xfc\x00", b"\x80" + b"\x7f" * 11, b"77777777777\0"],
    ids=["minus 256", "minus 1024", "2**87", "8 GiB"],
)
def test_absurd_sizes_end_the_shard(tmp_path: Path, size: bytes, whole: bool) -> None:
    """tarfile alone would read one member for ever, or fail with errors of its own."""
    path = tmp_path / "a.tar"
    write_members(path, *PAIR)
    path.write_bytes(with_size(path.read_bytes(), member_ends(path.read_bytes())[2], size))
    samples, found = scanned(path, whole)
    assert names(samples)[0] == ("k1", ["jpg", "txt"]) and not samples[0].cut_off
    assert all(sample.cut_off for sample in samples[1:]) and len(samples) <= 2
    assert found.damage


def test_damage_at_random_places(tmp_path: Path) -> None:
    """Both ways to read agree, and nothing but DataError comes out."""
    path = tmp_path / "a.tar"
    write_members(path, *PAIR, (f"{LONG}.txt", TEXT), format=tarfile.PAX_FORMAT)
    data, rng = path.read_bytes(), random.Random(5)
    seen = set()
    for _ in range(300):
        changed = bytearray(data[: rng.choice([len(data), rng.randrange(len(data))])] or b"x")
        for _ in range(rng.randint(0, 3)):
            changed[rng.randrange(len(changed))] = rng.choice([0, 0x80, 0xFF, ord("7"), rng.randrange(256)])
        path.write_bytes(changed)
        results = []
        for whole in (False, True):
            try:
                samples, found = scanned(path, whole)
                results.append((samples, found.damage))
                seen.add(bool(found.damage))
            except DataError:
                results.append(None)
                seen.add("refused")
        assert results[0] == results[1]
    assert seen == {True, False, "refused"}


def test_memory_does_not_grow_with_the_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_members(tmp_path / "a.tar", *((f"k{number}.txt", b"") for number in range(50)))
    opened: list[tarfile.TarFile] = []
    real = tarfile.open

    def watched(*args: Any, **options: Any) -> tarfile.TarFile:
        opened.append(real(*args, **options))
        return opened[-1]

    monkeypatch.setattr(tarfile, "open", watched)
    assert max(len(opened[0].members) for _ in ShardScan(Storage(), str(tmp_path / "a.tar"))) <= 2


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("behind", ["a page of zeros", "another tar", "anything"])
def test_samples_that_are_hidden_behind_zeros(tmp_path: Path, jpeg: bytes, behind: str, whole: bool) -> None:
    """A tar ends at its first block of zeros, wherever that comes from."""
    write_shard(tmp_path / "a.tar", [PairRecord(f"k{n:02d}", jpeg, f"caption {n}") for n in range(30)])
    data = bytearray((tmp_path / "a.tar").read_bytes())
    if behind == "a page of zeros":
        place = data.index(b"k10.jpg")
        data[place : place + 4096] = bytes(4096)
    elif behind == "another tar":
        data += bytes(data)
    else:
        data += b"?" * 30_000
    (tmp_path / "b.tar").write_bytes(data)
    shard = ShardScan(Storage(), str(tmp_path / "b.tar"), whole=whole)
    found = [sample.key for sample in shard]
    assert found == [f"k{n:02d}" for n in range(10 if "page" in behind else 30)]
    assert "there are data behind its end" in shard.damage
