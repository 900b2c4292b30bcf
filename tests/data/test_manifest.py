from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_atum.data.flags import ALWAYS_MASK, mask_of
from megatron_atum.data.manifest import Manifest, ShardEntry, dropped, entry_of, read_manifest, write_manifest
from megatron_atum.data.storage import MissingFile, Storage
from megatron_atum.errors import DataError
from tests.data.conftest import fake_sidecar

FLAGS = [0, mask_of(["bad_json"]), mask_of(["no_image"]), mask_of(["no_image", "few_tokens"]), 0]


def entry(path: str, damage: str = "") -> ShardEntry:
    sidecar = fake_sidecar("documents", [9, 0, 7, 4, 12], [[2], [], [], [], [2, 5]], FLAGS)
    sidecar.info = dataclasses.replace(sidecar.info, tar_bytes=1024, damage=damage, lost_images=3, tar_sha256="s")
    return entry_of(path, sidecar)


def manifest(folder: Path) -> Manifest:
    paths = [folder / "0.tar", folder / "sub" / "1.tar", folder.parent / "elsewhere" / "2.tar"]
    return Manifest("documents", "t", tuple(entry(str(path)) for path in paths))


def test_an_entry_sums_up_its_sidecar() -> None:
    one = entry("0.tar", "cut off")
    assert (one.samples, one.bytes, one.sha256, one.damage, one.lost_images) == (5, 1024, "s", "cut off", 3)
    assert one.used(0) == (5, 32, 3)
    assert one.used(ALWAYS_MASK) == (4, 32, 3)
    assert one.used(ALWAYS_MASK | mask_of(["no_image"])) == (2, 21, 3)
    assert one.used(mask_of(["few_tokens"])) == (4, 28, 3)


def test_dropped_samples_are_counted_under_one_reason() -> None:
    shards = [entry("0.tar"), entry("1.tar", "cut off")]
    assert dropped(shards, 0) == {"truncated_tar": 1}
    assert dropped(shards, ALWAYS_MASK) == {"bad_json": 2, "truncated_tar": 1}
    assert dropped(shards[:1], ALWAYS_MASK | mask_of(["few_tokens"])) == {"bad_json": 1, "few_tokens": 1}
    both = ALWAYS_MASK | mask_of(["few_tokens", "no_image"])
    assert dropped(shards, both) == {"bad_json": 2, "no_image": 4, "truncated_tar": 1}


def test_counts_add_up() -> None:
    """Whatever is dropped, by reason, and what is used make up all samples."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        flags = (rng.integers(0, 2**15, 20) & rng.integers(0, 2**15, 20) & rng.integers(0, 2**15, 20)).tolist()
        one = entry_of("0.tar", fake_sidecar("documents", [5] * 20, [[]] * 20, flags))
        mask = int(rng.integers(0, 2**15))
        assert one.used(mask)[0] + sum(dropped([one], mask).values()) == 20


def test_round_trip(tmp_path: Path) -> None:
    written = manifest(tmp_path)
    path = str(tmp_path / "manifest.json")
    write_manifest(path, written, Storage())
    assert read_manifest(path, Storage()) == written
    before = Path(path).read_bytes()
    write_manifest(path, read_manifest(path, Storage()), Storage())
    assert Path(path).read_bytes() == before


def test_totals_are_written_for_people(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "m.json"), manifest(tmp_path), Storage())
    record = json.loads((tmp_path / "m.json").read_text())
    assert [record[name] for name in ("version", "samples", "bytes", "tokens", "images")] == [1, 15, 3072, 96, 9]
    assert len((tmp_path / "m.json").read_text().splitlines()) == 1 + 3 + 1  # a line a shard


def test_paths_are_relative_below_the_folder(tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "a" / "m.json"), manifest(tmp_path / "a"), Storage())
    record = json.loads((tmp_path / "a" / "m.json").read_text())
    outside = str(tmp_path / "elsewhere" / "2.tar")
    assert [shard["path"] for shard in record["shards"]] == ["0.tar", "sub/1.tar", outside]
    (tmp_path / "a").rename(tmp_path / "b")
    moved = read_manifest(str(tmp_path / "b" / "m.json"), Storage())
    assert [shard.path for shard in moved.shards] == [
        *(str(tmp_path / "b" / p) for p in ("0.tar", "sub/1.tar")),
        outside,
    ]


def test_a_folder_with_a_longer_name_is_another_folder(tmp_path: Path) -> None:
    one = Manifest("pairs", "t", (entry(str(tmp_path / "data2" / "0.tar")),))
    write_manifest(str(tmp_path / "data" / "m.json"), one, Storage())
    assert read_manifest(str(tmp_path / "data" / "m.json"), Storage()) == one


def test_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = Manifest("pairs", "t", (entry("0.tar"), entry("sub/1.tar")))
    write_manifest("m.json", one, Storage())
    assert read_manifest("m.json", Storage()) == one


def test_remote_paths(tmp_path: Path) -> None:
    one = Manifest("pairs", "t", (entry("s3://bucket/set/0.tar"),))
    write_manifest(str(tmp_path / "m.json"), one, Storage())
    assert read_manifest(str(tmp_path / "m.json"), Storage()) == one


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"version": 1}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": 5}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": []}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": [5]}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": [{"path": "a"}]}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": [{"path": "a", "usage": []}]}',
        b'{"version": 1, "kind": "pairs", "tokenizer_sha256": "t", "shards": [{"path": "a", "usage": {"0": [1]}}]}',
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.json").write_bytes(content)
    with pytest.raises(DataError, match=r"m\.json .*; make it with tools/data/index\.py"):
        read_manifest(str(tmp_path / "m.json"), Storage())


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_manifest(str(path), manifest(tmp_path), Storage())
    content = path.read_bytes().rstrip()
    for size in range(0, len(content), 17):
        path.write_bytes(content[:size])
        with pytest.raises(DataError, match=r"m\.json is no manifest"):
            read_manifest(str(path), Storage())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 2}, "has version 2, not 1; run index.py again"),
        ({"version": "1"}, "has version '1'"),
        ({"kind": "videos"}, "has kind 'videos'"),
        ({"shards": []}, "0 shards"),
    ],
)
def test_another_version_or_kind(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    path = tmp_path / "m.json"
    write_manifest(str(path), manifest(tmp_path), Storage())
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=rf"m\.json .*{text}"):
        read_manifest(str(path), Storage())


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"m\.json does not exist"):
        read_manifest(str(tmp_path / "m.json"), Storage())
