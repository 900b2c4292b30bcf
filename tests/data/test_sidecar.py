"""The index of a shard: what it says of each sample, and its file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from megatron_atum.data import scan, sidecar
from megatron_atum.data.flags import FLAGS, mask_of
from megatron_atum.data.shards import DocumentRecord, PairRecord, read_shard, write_shard
from megatron_atum.data.sidecar import Sidecar, build_sidecar, read_sidecar, sidecar_path, usage
from megatron_atum.data.storage import MissingFile, Storage
from megatron_atum.data.text import encode_sample, filter_flags, parse_sample
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError
from tests.data.conftest import document_json, write_members

Members = list[tuple[str, bytes]]
WORDS = "some words that are long enough"
GOOD = [("good.jpg", b"i"), ("good.txt", b"fine")]


def build(path: Path, kind: str, tokenizer: Tokenizer, whole: bool = False) -> Sidecar:
    return build_sidecar(str(path), kind, tokenizer, Storage(), whole=whole)


def flags_by_key(found: Sidecar) -> dict[str, list[str]]:
    """The names of each sample's flags."""
    return {
        found.key(row): [name for place, name in enumerate(FLAGS) if int(found.flags[row]) >> place & 1]
        for row in range(len(found))
    }


def same_arrays(one: Sidecar, other: Sidecar) -> bool:
    names = list(one.arrays)
    return sorted(names) == sorted(other.arrays) and all(
        np.array_equal(one.arrays[name], other.arrays[name]) and one.arrays[name].dtype == other.arrays[name].dtype
        for name in names
    )


@pytest.mark.parametrize("kind", ["documents", "pairs"])
def test_says_what_the_shard_holds(tiny: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = tiny / f"{kind}-00000.tar"
    found, data = build(path, kind, tokenizer), path.read_bytes()
    samples = list(read_shard(path))
    assert [found.key(row) for row in range(len(found))] == [key for key, _ in samples]
    for row, (_, members) in enumerate(samples):
        text, *images = [
            data[place.offset : place.offset + place.size]
            for place in (found.text_member(row), *found.image_members(row))
        ]
        assert text == members["json" if kind == "documents" else "txt"]
        sample = parse_sample(text, kind)
        encoded = encode_sample(sample, tokenizer)
        assert found.sample_ids(row).tolist() == encoded.ids and found.tokens[row] == len(encoded.ids)
        assert found.image_positions(row).tolist() == encoded.image_positions
        assert images == [members[image.name or "jpg"] for image in sample.images] and found.images[row] == len(images)
        assert found.flags[row] == filter_flags(sample, encoded, kind)
    assert found.info.kind == kind and found.info.tokenizer_sha256 == tokenizer.sha256


def test_images_follow_the_text_not_the_tar(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = json.dumps({"texts": [None, "x", None, None], "images": ["001.jpg", None, "000.JPG", "001.jpg"]}).encode()
    path = tmp_path / "0.tar"
    write_members(path, ("d.000.JPG", b"zero"), ("d.json", text), ("d.001.jpg", b"one"))
    found = build(path, "documents", tokenizer)
    data = path.read_bytes()
    assert [data[m.offset : m.offset + m.size] for m in found.image_members(0)] == [b"one", b"zero", b"one"]


def test_triples_of_img2dataset(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    """The json beside a pair is not looked at, whatever it holds."""
    path = tmp_path / "00000.tar"
    members: Members = []
    for key, record in (("000000000", b'{"status": "success", "caption": "no"}'), ("000000007", b"\xff[")):
        members += [(f"{key}.jpg", jpeg), (f"{key}.json", record), (f"{key}.txt", b"a cat"), (f"{key}.cls", b"3")]
    write_members(path, *members)
    found = build(path, "pairs", tokenizer)
    assert flags_by_key(found) == {"000000000": [], "000000007": []}
    assert tokenizer.decode(found.sample_ids(1)) == "a cat"


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "JPG"])
def test_image_suffixes_of_pairs(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    write_members(tmp_path / "0.tar", (f"k.{name}", b"i"), ("k.txt", b"t"))
    assert flags_by_key(build(tmp_path / "0.tar", "pairs", tokenizer)) == {"k": []}


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("missing_part", [("k.jpg", b"i")]),
        ("missing_part", [("k.txt", b"t")]),
        ("missing_part", [("k.gif", b"i"), ("k.txt", b"t")]),
        ("bad_name", [("k", b"t")]),
        ("bad_name", [("../k.jpg", b"i"), ("../k.txt", b"t")]),
        ("bad_name", [("/k.jpg", b"i"), ("/k.txt", b"t")]),
        ("image_count_mismatch", [("k.jpg", b"i"), ("k.png", b"i"), ("k.txt", b"t")]),
        ("absurd_size", [("k.jpg", b""), ("k.txt", b"t")]),
        ("absurd_size", [("k.jpg", b"i"), ("k.txt", b"t" * 1001)]),
        ("not_utf8", [("k.jpg", b"i"), ("k.txt", b"\xff")]),
        ("no_text", [("k.jpg", b"i"), ("k.txt", b" ")]),
        ("no_text", [("k.jpg", b"i"), ("k.txt", b"")]),
        ("special_token_in_text", [("k.jpg", b"i"), ("k.txt", b"a </s> b")]),
        ("duplicate_key", GOOD),
    ],
)
def test_pairs_with_a_fault(
    tmp_path: Path, tokenizer: Tokenizer, reason: str, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "MAX_TEXT_BYTES", 1000)
    write_members(tmp_path / "0.tar", *GOOD, *members, ("last.jpg", b"i"), ("last.txt", b"fine"))
    # A key that comes at once again is only told apart by a key between.
    if reason == "duplicate_key":
        write_members(tmp_path / "0.tar", *GOOD, ("last.jpg", b"i"), ("last.txt", b"fine"), *members)
    found = build(tmp_path / "0.tar", "pairs", tokenizer)
    assert sorted(found.flags.tolist()) == [0, 0, mask_of([reason])]
    row = found.flags.tolist().index(mask_of([reason]))
    if reason != "special_token_in_text":
        assert (found.tokens[row], found.images[row], found.image_members(row)) == (0, 0, [])
    assert usage(found)[mask_of([reason])] == (1, int(found.tokens[row]), int(found.images[row]))


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("missing_part", [("k.000.jpg", b"i")]),
        ("missing_part", [("k.json", document_json(None, "t"))]),
        ("missing_part", [("k.json", document_json(None, "t", None)), ("k.000.jpg", b"i")]),
        ("missing_part", [("k.json", document_json(None, "t")), ("k.0.jpg", b"i")]),
        ("image_count_mismatch", [("k.json", document_json("t")), ("k.000.jpg", b"i")]),
        ("absurd_size", [("k.json", document_json(None, "t")), ("k.000.jpg", b"")]),
        ("bad_json", [("k.json", b"{")]),
        ("bad_json", [("k.json", b"[" * 100_000)]),
        ("not_utf8", [("k.json", b'{"texts": ["\xff"]}')]),
        ("not_utf8", [("k.json", b'{"texts": ["\\udc00"], "images": [null]}')]),
        ("no_text", [("k.json", document_json(None)), ("k.000.jpg", b"i")]),
        ("missing_part", [("k.json", document_json(None, "t", images=["../last.jpg", None]))]),
    ],
)
def test_documents_with_a_fault(tmp_path: Path, tokenizer: Tokenizer, reason: str, members: Members) -> None:
    path = tmp_path / "0.tar"
    write_members(path, *members, ("last.json", document_json(None, WORDS)), ("last.000.jpg", b"last"))
    found = build(path, "documents", tokenizer)
    assert flags_by_key(found) == {"k": [reason], "last": []}
    (place,) = found.image_members(1)
    assert path.read_bytes()[place.offset :].startswith(b"last")


def test_a_key_that_comes_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its first part is judged by itself; nothing is put together across other keys."""
    write_members(tmp_path / "0.tar", ("k.jpg", b"i"), *GOOD, ("k.txt", b"t"), ("good.txt", b"t"))
    found = build(tmp_path / "0.tar", "pairs", tokenizer)
    assert [found.key(row) for row in range(4)] == ["k", "good", "k", "good"]
    assert found.flags.tolist() == [mask_of(["missing_part"]), 0, *[mask_of(["duplicate_key"])] * 2]


def test_the_worst_fault_counts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_members(tmp_path / "0.tar", ("../k.jpg", b""), *GOOD, ("e.png", b""), ("e.txt", b"\xff"))
    found = build(tmp_path / "0.tar", "pairs", tokenizer)
    assert flags_by_key(found) == {"../k": ["bad_name"], "good": [], "e": ["absurd_size"]}


def test_links_and_folders_are_no_content(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/k.txt", tarfile.SYMTYPE), ("d/k.jpg", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    found = build(tmp_path / "0.tar", "pairs", tokenizer)
    assert flags_by_key(found) == {"d/k": ["absurd_size"]}


def test_every_cut_keeps_the_complete_samples(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    whole, cut = tmp_path / "whole.tar", tmp_path / "cut.tar"
    records = [DocumentRecord(f"d{i}", [None, WORDS, None], [jpeg, None, jpeg]) for i in range(3)]
    write_shard(whole, records)
    data, complete = whole.read_bytes(), build(whole, "documents", tokenizer)
    last = [max(m.offset + m.size for m in complete.image_members(row)) for row in range(3)]
    for size in range(512, data.index(b"d2.001.jpg") + 2048, 512):
        cut.write_bytes(data[:size])
        found = build(cut, "documents", tokenizer)
        flags = found.flags.tolist()
        good = sum(end <= size for end in last)
        assert flags[:good] == [0] * good and len(flags) <= good + 1
        assert set(flags[good:]) <= {mask_of(["cut_off"]), mask_of(["missing_part"])}
        assert found.tokens[:good].tolist() == complete.tokens[:good].tolist()
        assert bool(found.info.damage) == (size < -(-last[-1] // 512) * 512 + 512)


def test_whole_reads_the_same_and_hashes_it(tiny: Path, tokenizer: Tokenizer) -> None:
    path = tiny / "documents-00000.tar"
    quick, whole = (build(path, "documents", tokenizer, whole=whole) for whole in (False, True))
    assert same_arrays(quick, whole) and quick.digest() == whole.digest()
    assert whole.info.tar_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert dataclasses.replace(whole.info, tar_sha256="") == quick.info
    assert quick.info.tar_bytes == path.stat().st_size


def test_round_trip_through_a_file(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    built = build(tiny / "documents-00000.tar", "documents", tokenizer)
    path = sidecar_path(str(tmp_path / "a.tar"))
    assert path.endswith("a.tar.index.safetensors")
    Storage().write(path, built.to_bytes())
    read = read_sidecar(path, Storage())
    assert same_arrays(read, built) and read.info == replace(built.info, index_sha256=built.digest())
    assert read.key(3) == built.key(3) and read.image_members(3) == built.image_members(3)
    assert read.to_bytes() == built.to_bytes() == Path(path).read_bytes()
    theirs = load(Path(path).read_bytes())
    assert same_arrays(Sidecar(built.info, theirs), built)


def test_file_is_mapped_not_read(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.tar.index.safetensors"
    path.write_bytes(build(tiny / "documents-00000.tar", "documents", tokenizer).to_bytes())
    found = read_sidecar(str(path), Storage())
    assert all(not array.flags.owndata and not array.flags.writeable for array in found.arrays.values())
    with open(path, "r+b") as file:
        file.seek(-1, 2)  # the keys lie last
        file.write(b"Z")
    assert found.key(len(found) - 1).endswith("Z")


def test_shard_without_samples(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_members(tmp_path / "0.tar")
    built = build(tmp_path / "0.tar", "pairs", tokenizer)
    (tmp_path / "0.idx").write_bytes(built.to_bytes())
    read = read_sidecar(str(tmp_path / "0.idx"), Storage())
    assert len(read) == 0 and same_arrays(read, built) and usage(read) == {}
    assert read.digest() == built.digest()


def test_digest_follows_content_not_place(tmp_path: Path, tiny: Path, tokenizer: Tokenizer) -> None:
    found = build(tiny / "documents-00000.tar", "documents", tokenizer)
    shutil.copy(tiny / "documents-00000.tar", tmp_path / "other.tar")
    assert build(tmp_path / "other.tar", "documents", tokenizer).digest() == found.digest()
    digests = {found.digest()}
    for name, array in found.arrays.items():
        digests.add(Sidecar(found.info, found.arrays | {name: array ^ 1}).digest())
        digests.add(Sidecar(found.info, found.arrays | {name: array[:-1]}).digest())
        digests.add(Sidecar(found.info, found.arrays | {name: array.view(f"i{array.itemsize}")}).digest())
    digests |= {Sidecar(dataclasses.replace(found.info, **{name: "x"}), found.arrays).digest() for name in IDENTITY}
    assert len(digests) == 1 + 3 * len(found.arrays) + len(IDENTITY)
    other = dataclasses.replace(found.info, tar_sha256="x", damage="y")
    assert Sidecar(other, found.arrays).digest() == found.digest()


IDENTITY = ("kind", "tokenizer_sha256")


class LargeTokenizer:
    """A vocabulary that needs more than 16 bits."""

    sha256, bos_id, eos_id = "large", 1, 2

    def __init__(self, vocab_size: int) -> None:
        self.fake_id, self.image_id = vocab_size, vocab_size + 1

    def encode(self, text: str) -> list[int]:
        return [self.fake_id - 1 - len(word) for word in text.split()]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65534, np.uint16), (65535, np.uint32), (150_000, np.uint32)])
def test_width_of_the_ids(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    write_members(tmp_path / "0.tar", ("k.jpg", b"i"), ("k.txt", b"a bc"))
    large: object = LargeTokenizer(vocab_size)
    built = build(tmp_path / "0.tar", "pairs", large)  # type: ignore[arg-type]
    (tmp_path / "0.idx").write_bytes(built.to_bytes())
    read = read_sidecar(str(tmp_path / "0.idx"), Storage())
    v = vocab_size
    assert read.ids.dtype == dtype and read.sample_ids(0).tolist() == [1, v, v + 1, v, v - 2, v - 3, 2]


def test_keys_that_are_not_utf8(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_members(tmp_path / "0.tar", ("é/k.jpg", b"i"), ("é/k.txt", b"t"), ("\udce9.jpg", b"i"), ("\udce9.txt", b"t"))
    found = build(tmp_path / "0.tar", "pairs", tokenizer)
    assert flags_by_key(found) == {"é/k": [], "\udce9": []}


def test_lost_images_are_counted_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "0.tar", [DocumentRecord("d", ["a", None], [None, None], missing={1: "404"})])
    found = build(tmp_path / "0.tar", "documents", tokenizer)
    assert (found.info.lost_images, found.images.tolist()) == (1, [0])


@pytest.fixture(scope="module")
def content(tiny: Path, tokenizer: Tokenizer) -> bytes:
    return build(tiny / "pairs-00000.tar", "pairs", tokenizer).to_bytes()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_sidecar(str(path), Storage())
    assert str(path) in str(error.value) and "index.py" in str(error.value)
    return str(error.value)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def test_cut_off_anywhere(tmp_path: Path, content: bytes) -> None:
    for size in [0, 1, 7, 8, 9, 100, *range(101, len(content), 53), len(content) - 1]:
        assert "no sidecar" in refused(tmp_path / "a.idx", content[:size])


@pytest.mark.parametrize("header", [b"5", b"null", b"[]", b"{}", b'{"__metadata__": {}}', b"[" * 5000, b"\xff"])
def test_header_that_is_none(tmp_path: Path, header: bytes) -> None:
    assert "no sidecar" in refused(tmp_path / "a.idx", with_header(header))


def test_damaged_header(tmp_path: Path, content: bytes) -> None:
    """Nothing but DataError, whatever byte is wrong."""
    path, rng = tmp_path / "a.idx", np.random.default_rng(3)
    length = int.from_bytes(content[:8], "little")
    refusals = 0
    for place in range(0, 8 + length, 3):
        damaged = bytearray(content)
        damaged[place] = int(rng.choice(list(b'09[]{}",:x\xff')))
        path.write_bytes(damaged)
        try:
            read_sidecar(str(path), Storage())
        except DataError:
            refusals += 1
    assert refusals > length / 6


def test_arrays_that_are_missing_or_of_another_type(tmp_path: Path, content: bytes) -> None:
    arrays, metadata = load(content), json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for changed in ({k: v for k, v in arrays.items() if k != "ids"}, arrays | {"ids": arrays["ids"].astype(float)}):
        refused(tmp_path / "a.idx", save(changed, metadata["__metadata__"]))


@pytest.mark.parametrize(
    "name", ["first_token", "first_image", "image_position", "flags", "member_block", "ids", "keys"]
)
def test_arrays_whose_lengths_do_not_agree(tmp_path: Path, content: bytes, name: str) -> None:
    arrays, metadata = load(content), json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    refused(tmp_path / "a.idx", save(arrays | {name: arrays[name][:-1]}, metadata["__metadata__"]))


def test_another_version(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "SIDECAR_VERSION", 2)
    assert "has version 1, not 2" in refused(tmp_path / "a.idx", content)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"a\.idx does not exist"):
        read_sidecar(str(tmp_path / "a.idx"), Storage())


def test_pairs_are_recorded_like_documents(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    """The same text and image give the same ids, as a pair and as a document."""
    write_shard(tmp_path / "p.tar", [PairRecord("k", jpeg, "a cat on a mat")])
    write_shard(tmp_path / "d.tar", [DocumentRecord("k", [None, "a cat on a mat"], [jpeg, None])])
    pair, document = build(tmp_path / "p.tar", "pairs", tokenizer), build(tmp_path / "d.tar", "documents", tokenizer)
    assert pair.ids.tolist() == document.ids.tolist() and pair.digest() != document.digest()
