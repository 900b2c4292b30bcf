"""Every fault that a shard can have is reported, by shard and key, and nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.data.indexing import Indexing, find_shards, index_shards, manifest_for
from megatron_atum.data.manifest import read_manifest, write_manifest
from megatron_atum.data.shards import DocumentRecord, PairRecord, write_shard
from megatron_atum.data.sidecar import read_sidecar
from megatron_atum.data.storage import Storage
from megatron_atum.data.validating import Checks, Fault, validate
from megatron_atum.errors import DataError
from tests.data.conftest import document_json, write_members

Found = list[tuple[str, str, str]]


def index(folder: Path, tiny: Path, kind: str = "documents", doubled: bool = False) -> None:
    shards = find_shards([str(folder)])
    index_shards(Indexing(kind, str(tiny), allow_doubled_keys=doubled), shards, manifest_for(shards, None))


def faults(folder: Path, checks: Checks = Checks(), workers: int = 0) -> Found:  # noqa: B008
    return [short(fault) for fault in validate(str(folder / "manifest.json"), checks, workers)]


def short(fault: Fault) -> tuple[str, str, str]:
    return Path(fault.shard).name, fault.key, fault.reason


def record(key: str, jpeg: bytes, text: str = "a text of some words") -> DocumentRecord:
    return DocumentRecord(key, [None, text, None], [jpeg, None, jpeg])


@pytest.fixture
def folder(tmp_path: Path, tiny: Path, jpeg: bytes) -> Path:
    """Three shards of documents, and a sound index."""
    path = tmp_path / "documents"
    path.mkdir()
    for shard in "012":
        write_shard(path / f"{shard}.tar", [record(f"{shard}{key}", jpeg) for key in "abc"])
    index(path, tiny)
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_sound_shards_have_no_fault(folder: Path, tiny: Path, workers: int) -> None:
    assert faults(folder, Checks(images=True, tokenizer=str(tiny)), workers) == []


def test_pairs_have_no_fault(tmp_path: Path, tiny: Path, jpeg: bytes) -> None:
    write_shard(tmp_path / "0.tar", [PairRecord(key, jpeg, "a caption", {"width": 24}) for key in "abc"])
    index(tmp_path, tiny, "pairs")
    assert faults(tmp_path, Checks(images=True, tokenizer=str(tiny))) == []


def remove_tar(folder: Path) -> Found:
    (folder / "1.tar").unlink()
    return [("1.tar", "", "missing_shard")]


def cut_tar(folder: Path) -> Found:
    """Within the second of its three samples."""
    member = read_sidecar(str(folder / "1.tar.index.safetensors"), Storage()).image_members(1)[0]
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[: member.offset + 10])
    shard = [("1.tar", "", reason) for reason in ("size_differs", "sha256_differs", "truncated_tar")]
    return [*shard, ("1.tar", "1b", "cut_off"), ("1.tar", "1c", "missing_sample")]


def flip_in_image(folder: Path) -> Found:
    member = read_sidecar(str(folder / "1.tar.index.safetensors"), Storage()).image_members(1)[1]
    flip(folder / "1.tar", member.offset + 1)
    return [("1.tar", "", "sha256_differs"), ("1.tar", "1b", "corrupt_image")]


def flip_in_text(folder: Path) -> Found:
    place = read_sidecar(str(folder / "1.tar.index.safetensors"), Storage()).text_member(2).offset
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[:place] + content[place:].replace(b"some", b"home", 1))
    return [("1.tar", "", "sha256_differs"), ("1.tar", "1c", "ids_differ")]


def put_a_control_token(folder: Path) -> Found:
    place = read_sidecar(str(folder / "1.tar.index.safetensors"), Storage()).text_member(2).offset
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[:place] + content[place:].replace(b"some", b"</s>", 1))
    return [("1.tar", "", "sha256_differs"), ("1.tar", "1c", "flags_differ")]


def break_json(folder: Path) -> Found:
    flip(folder / "1.tar", read_sidecar(str(folder / "1.tar.index.safetensors"), Storage()).text_member(0).offset)
    return [("1.tar", "", "sha256_differs"), ("1.tar", "1a", "bad_json")]


def swap_tars(folder: Path) -> Found:
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    new = [("1.tar", f"0{key}", "unindexed_sample") for key in "abc"]
    return [("1.tar", "", "sha256_differs"), *new, *[("1.tar", f"1{key}", "missing_sample") for key in "abc"]]


def write_garbage(folder: Path) -> Found:
    (folder / "1.tar").write_bytes(b"garbage" * 1000)
    return [("1.tar", "", "unreadable_shard")]


def remove_sidecar(folder: Path) -> Found:
    (folder / "1.tar.index.safetensors").unlink()
    return [("1.tar", "", "missing_index")]


def cut_sidecar(folder: Path) -> Found:
    (folder / "1.tar.index.safetensors").write_bytes((folder / "1.tar.index.safetensors").read_bytes()[:200])
    return [("1.tar", "", "damaged_index")]


def flip_in_sidecar(folder: Path) -> Found:
    flip(folder / "1.tar.index.safetensors", -1)
    return [("1.tar", "", "wrong_index")]


def add_tar(folder: Path) -> Found:
    shutil.copy(folder / "1.tar", folder / "3.tar")
    return [("3.tar", "", "unlisted_shard")]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x55
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        *(remove_tar, cut_tar, flip_in_image, flip_in_text, put_a_control_token, break_json, swap_tars, write_garbage),
        *(remove_sidecar, cut_sidecar, flip_in_sidecar, add_tar),
    ],
)
def test_damage_is_found(folder: Path, tiny: Path, damage: Callable[[Path], Found]) -> None:
    expected = damage(folder)
    found = faults(folder, Checks(images=True, tokenizer=str(tiny)))
    if damage is cut_tar:  # what is left of its images cannot be decoded either
        found = [fault for fault in found if fault[2] != "corrupt_image"]
    assert found == expected


def test_members_that_moved_are_found_without_sha256(tmp_path: Path, tiny: Path, jpeg: bytes) -> None:
    text = document_json(None, "some words", None)
    good = [
        (f"{key}.{name}", content)
        for key in "abcd"
        for name, content in (("json", text), ("000.jpg", jpeg), ("001.jpg", jpeg))
    ]
    write_members(tmp_path / "0.tar", *good)
    shards = find_shards([str(tmp_path)])
    index_shards(Indexing("documents", str(tiny), whole=False), shards, manifest_for(shards, None))
    assert faults(tmp_path) == []
    a, b, c, d = (good[3 * n : 3 * n + 3] for n in range(4))
    images_swapped, one_longer = [b[0], b[2], b[1]], [c[0], (c[1][0], jpeg + b"0"), c[2]]
    write_members(tmp_path / "0.tar", *a, *images_swapped, *one_longer, d[0], d[1], ("d.002.jpg", jpeg))
    assert faults(tmp_path) == [("0.tar", key, "wrong_place") for key in "bcd"]
    write_members(tmp_path / "0.tar", *a, ("b.xxxx", text), *b[1:], *c, *d[1:], d[0])
    assert faults(tmp_path) == [("0.tar", "b", "missing_part"), ("0.tar", "d", "wrong_place")]
    write_members(tmp_path / "0.tar", *good, ("d.002.jpg", jpeg))
    assert ("0.tar", "d", "wrong_place") in faults(tmp_path)


def test_samples_that_were_broken_when_indexed_are_named(tmp_path: Path, tiny: Path, jpeg: bytes) -> None:
    good = document_json(None, "some words")
    members = [
        ("good.json", good),
        ("good.000.jpg", jpeg),
        ("json.json", b"{"),
        ("lost.json", good),
        ("empty.json", good),
        ("empty.000.jpg", b""),
        ("more.json", document_json("text")),
        ("more.000.jpg", jpeg),
        ("silent.json", document_json(None)),
        ("silent.000.jpg", jpeg),
        ("good.json", good),
        ("good.000.jpg", jpeg),
    ]
    write_members(tmp_path / "0.tar", *members)
    index(tmp_path, tiny)
    assert faults(tmp_path, Checks(images=True, tokenizer=str(tiny))) == [
        ("0.tar", "json", "bad_json"),
        ("0.tar", "lost", "missing_part"),
        ("0.tar", "empty", "absurd_size"),
        ("0.tar", "more", "image_count_mismatch"),
        ("0.tar", "good", "duplicate_key"),
    ]


def test_a_shard_that_was_cut_when_indexed_stays_a_fault(folder: Path, tiny: Path) -> None:
    content = (folder / "2.tar").read_bytes()
    (folder / "2.tar").write_bytes(content[: len(content) // 2])
    index(folder, tiny)
    assert ("2.tar", "", "truncated_tar") in faults(folder)


def test_keys_of_two_shards_are_found(folder: Path, tiny: Path, jpeg: bytes) -> None:
    write_shard(folder / "3.tar", [record(key, jpeg) for key in ("0a", "1b", "3c")])
    index(folder, tiny, doubled=True)
    assert faults(folder) == [("3.tar", "0a", "duplicate_key"), ("3.tar", "1b", "duplicate_key")]


def test_data_sets_may_share_a_folder(folder: Path, tiny: Path, jpeg: bytes) -> None:
    write_shard(folder / "pairs.tar", [PairRecord("a", jpeg, "a caption")])
    shards = find_shards([str(folder / "pairs.tar")])
    index_shards(Indexing("pairs", str(tiny)), shards, str(folder / "pairs.json"))
    (folder / "notes.json").write_text("[]")
    assert faults(folder) == []


def test_a_manifest_of_another_index_is_found(folder: Path) -> None:
    path = str(folder / "manifest.json")
    manifest = read_manifest(path, Storage())
    first = replace(manifest.shards[0], index_sha256="0" * 64)
    write_manifest(path, replace(manifest, shards=(first, *manifest.shards[1:])), Storage())
    assert faults(folder) == [("0.tar", "", "wrong_index")]


def test_another_tokenizer_and_no_manifest_are_mistakes(folder: Path, tmp_path: Path, make_data_script: Any) -> None:
    other = tmp_path / "tokenizer.model"
    texts = [" ".join(places).upper() for places in make_data_script.DOCUMENTS.values()]
    other.write_bytes(make_data_script.train_tokenizer(texts))
    with pytest.raises(DataError, match="another tokenizer"):
        faults(folder, Checks(tokenizer=str(other)))
    with pytest.raises(DataError, match="does not exist"):
        faults(tmp_path)
