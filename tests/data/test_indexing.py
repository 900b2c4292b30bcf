"""The index that tools/data/index.py makes: complete, the same again after a kill, and never of half a data set."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import psutil
import pytest

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.index import open_source
from megatron_atum.data.indexing import Indexing, find_shards, index_shards, load_tokenizer, manifest_for
from megatron_atum.data.manifest import Manifest, read_manifest
from megatron_atum.data.shards import DocumentRecord, PairRecord, write_shard
from megatron_atum.data.sidecar import build_sidecar, read_sidecar, sidecar_path
from megatron_atum.data.storage import Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError
from tests.data.conftest import document_json, write_members


def write_pairs(folder: Path, jpeg: bytes, shards: int = 3, samples: int = 4) -> Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        records = [PairRecord(f"{shard}-{n}", jpeg, f"caption {n} of shard {shard}") for n in range(samples)]
        write_shard(folder / f"{shard:03d}.tar", records)
    return folder


def make(folder: Path, how: Indexing, workers: int = 0) -> Manifest:
    shards = find_shards([str(folder)])
    return index_shards(how, shards, manifest_for(shards, None), workers)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".tar"}


def made_at(folder: Path) -> dict[str, int]:
    """By shard: changes when the file is written again."""
    return {path.name.split(".")[0]: path.stat().st_mtime_ns for path in folder.glob("*.index.safetensors")}


@pytest.fixture
def pairs(tmp_path: Path, jpeg: bytes) -> Path:
    return write_pairs(tmp_path / "pairs", jpeg)


@pytest.fixture
def how(tiny: Path) -> Indexing:
    return Indexing("pairs", str(tiny))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_can_use_it(pairs: Path, how: Indexing, tokenizer: Tokenizer, workers: int) -> None:
    manifest = make(pairs, how, workers)
    assert [Path(shard.path).name for shard in manifest.shards] == ["000.tar", "001.tar", "002.tar"]
    assert read_manifest(str(pairs / "manifest.json"), Storage()) == manifest
    source = SourceConfig("pairs", str(pairs / "manifest.json"), kind="pairs")
    index = open_source(source, [], tokenizer, Storage())
    assert (len(index), index.usable, index.images) == (12, 12, 12)
    for number, shard in enumerate(manifest.shards):
        whole = build_sidecar(shard.path, "pairs", tokenizer, Storage(), whole=True)
        assert index.sidecar(number).to_bytes() == whole.to_bytes()
        assert len(shard.sha256) == 64


def test_the_data_set_can_be_moved(pairs: Path, how: Indexing, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make(pairs, how)
    pairs.rename(tmp_path / "moved")
    source = SourceConfig("pairs", str(tmp_path / "moved" / "manifest.json"), kind="pairs")
    assert open_source(source, [], tokenizer, Storage()).sidecar(0).key(0) == "0-0"


def test_what_fits_is_kept_and_what_does_not_is_made_again(
    pairs: Path, how: Indexing, tokenizer: Tokenizer, jpeg: bytes
) -> None:
    manifest = make(pairs, how)
    before, first = contents(pairs), made_at(pairs)
    assert make(pairs, how) == manifest and made_at(pairs) == first
    other_kind = build_sidecar(str(pairs / "000.tar"), "documents", tokenizer, Storage(), whole=True)
    (pairs / "000.tar.index.safetensors").write_bytes(other_kind.to_bytes())
    (pairs / "001.tar.index.safetensors").write_bytes(before["001.tar.index.safetensors"][:100])
    kept = made_at(pairs)["002"]
    make(pairs, how)
    assert contents(pairs) == before and made_at(pairs)["002"] == kept
    make(pairs, replace(how, force=True))
    assert contents(pairs) == before and made_at(pairs)["002"] != kept


def test_a_shard_that_was_written_again_is_indexed_again(pairs: Path, how: Indexing, jpeg: bytes) -> None:
    make(pairs, how)
    size = (pairs / "001.tar").stat().st_size
    write_shard(pairs / "001.tar", [PairRecord(f"new{n}", jpeg, "caption 0 of shard 1") for n in range(4)])
    assert (pairs / "001.tar").stat().st_size == size
    later = time.time() + 10
    os.utime(pairs / "001.tar", (later, later))
    make(pairs, how)
    assert read_sidecar(str(pairs / "001.tar.index.safetensors"), Storage()).key(0) == "new0"


def test_without_sha256_only_headers_are_read_until_it_is_asked_for(pairs: Path, how: Indexing) -> None:
    quick = make(pairs, replace(how, whole=False))
    assert [shard.sha256 for shard in quick.shards] == [""] * 3
    made = made_at(pairs)
    whole = make(pairs, how)
    assert all(shard.sha256 for shard in whole.shards) and set(made.values()).isdisjoint(made_at(pairs).values())
    assert [shard.index_sha256 for shard in whole.shards] == [shard.index_sha256 for shard in quick.shards]
    assert make(pairs, replace(how, whole=False)) == whole  # what is known already is not forgotten


SCRIPT = """
import sys, time
from megatron_atum.data import indexing
build = indexing.build_sidecar
def one_and_no_more(shard, *arguments, **options):
    if not str(shard).endswith("000.tar"):
        time.sleep(600)
    return build(shard, *arguments, **options)
indexing.build_sidecar = one_and_no_more
how = indexing.Indexing("pairs", sys.argv[2])
shards = indexing.find_shards([sys.argv[1]])
indexing.index_shards(how, shards, indexing.manifest_for(shards, None))
"""


def test_killed_and_started_again_it_writes_the_same_bytes(
    pairs: Path, how: Indexing, jpeg: bytes, tmp_path: Path
) -> None:
    whole = write_pairs(tmp_path / "reference", jpeg)
    make(whole, how)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(pairs), how.tokenizer])
    wait_for(lambda: (pairs / "000.tar.index.safetensors").exists())
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (pairs / "manifest.json").exists() and not (pairs / "002.tar.index.safetensors").exists()
    (pairs / "001.tar.index.safetensors.0123abcd.tmp").write_bytes(b"half")  # as a kill during a write leaves it
    kept = made_at(pairs)["000"]
    make(pairs, how)
    assert contents(pairs) == contents(whole) and made_at(pairs)["000"] == kept


def test_workers_end_with_a_killed_parent(pairs: Path, how: Indexing, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\nfrom pathlib import Path\nfrom megatron_atum.data.processes import in_processes\n"
        "def work(folder):\n    Path(folder, str(os.getpid())).touch()\n    time.sleep(600)\n"
        "if __name__ == '__main__':\n    list(in_processes(work, sys.argv[1:] * 2, 2))\n"
    )
    at_work = tmp_path / "at work"
    at_work.mkdir()
    process = subprocess.Popen([sys.executable, str(script), str(at_work)])
    wait_for(lambda: len(list(at_work.iterdir())) == 2)
    below = psutil.Process(process.pid).children(recursive=True)
    assert {int(file.name) for file in at_work.iterdir()} <= {worker.pid for worker in below}
    process.kill()
    process.wait()
    assert psutil.wait_procs(below, timeout=10)[1] == []


def test_a_cut_shard_counts_with_its_complete_samples(pairs: Path, how: Indexing) -> None:
    content = (pairs / "001.tar").read_bytes()
    (pairs / "001.tar").write_bytes(content[:3000])
    entry = make(pairs, how).shards[1]
    assert "cut off" in entry.damage and 1 <= entry.used(0xFFFF)[0] < 4


def test_shards_that_cannot_be_read_are_listed_and_no_manifest_is_written(pairs: Path, how: Indexing) -> None:
    (pairs / "000.tar").write_bytes(b"\x1f\x8bno tar" * 1000)
    (pairs / "002.tar").write_bytes(b"nor this" * 1000)
    with pytest.raises(DataError, match=r"2 of 3 shards cannot be read:\n.*000\.tar.*\n.*002\.tar") as caught:
        make(pairs, how)
    assert "001" not in str(caught.value)
    assert [path.name for path in pairs.glob("*.index.safetensors")] == ["001.tar.index.safetensors"] and not (
        pairs / "manifest.json"
    ).exists()


def test_keys_of_several_shards_are_refused_unless_allowed(pairs: Path, how: Indexing) -> None:
    shutil.copy(pairs / "001.tar", pairs / "copy.tar")
    with pytest.raises(DataError, match=r"4 keys are in several shards, such as\n  1-0 in .*001\.tar, .*copy\.tar"):
        make(pairs, how)
    assert not (pairs / "manifest.json").exists()
    shards = find_shards([str(pairs)])
    manifest, doubled = index_shards(replace(how, allow_doubled_keys=True), shards, str(pairs / "manifest.json"))
    assert len(manifest.shards) == 4 and doubled.count == 4


def test_a_key_twice_in_one_shard_is_a_fault_of_the_second(tmp_path: Path, tiny: Path) -> None:
    text = document_json("text")
    write_members(tmp_path / "0.tar", ("a.json", text), ("b.json", text), ("a.json", text))
    write_shard(tmp_path / "1.tar", [DocumentRecord("c", ["text"], [None])])
    manifest = make(tmp_path, Indexing("documents", str(tiny)))
    assert manifest.shards[0].samples == 3 and len(manifest.shards[0].usage) == 2


def test_the_tokenizer_is_checked_before_any_shard(pairs: Path, how: Indexing, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"512 pieces but .* is 1000"):
        make(pairs, replace(how, vocab_size=1000))
    (tmp_path / "no.model").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not a sentencepiece model"):
        make(pairs, replace(how, tokenizer=str(tmp_path / "no.model")))
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none.model"))
    assert list(pairs.glob("*.index.safetensors")) == []


def test_shards_are_named_by_files_globs_and_folders(
    pairs: Path, how: Indexing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pairs / "notes.txt").write_text("")
    (pairs / "000.tar.1f.tmp").write_text("")
    every = [str(pairs / f"00{n}.tar") for n in range(3)]
    assert find_shards([str(pairs)]) == find_shards([str(pairs / "*.ta[r]*")]) == every
    assert find_shards([every[1], str(pairs), every[1]]) == every
    with pytest.raises(DataError, match=r"no shard matches .*none-\*\.tar"):
        find_shards([str(pairs), str(pairs / "none-*.tar")])
    monkeypatch.chdir(tmp_path)
    assert find_shards(["pairs"]) == every and manifest_for(every, "m.json") == str(tmp_path / "m.json")
    with pytest.raises(DataError, match="--manifest"):
        manifest_for([*every, "/elsewhere/000.tar"], None)


def test_a_manifest_elsewhere_finds_its_shards(
    pairs: Path, how: Indexing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lists").mkdir()
    index_shards(how, find_shards(["pairs"]), manifest_for([], "lists/pairs.json"))
    monkeypatch.chdir("/")
    manifest = read_manifest(str(tmp_path / "lists" / "pairs.json"), Storage())
    assert all(Path(shard.path).exists() for shard in manifest.shards)


def test_shards_of_an_object_store(pairs: Path, how: Indexing) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(pairs), "/bucket/pairs", recursive=True)
    try:
        shards = find_shards(["memory://bucket/pairs"])
        index_shards(how, shards, manifest_for(shards, None))
        manifest = read_manifest("memory://bucket/pairs/manifest.json", Storage())
        assert sum(shard.samples for shard in manifest.shards) == 12
        assert read_sidecar(sidecar_path(shards[0]), Storage()).key(1) == "0-1"
    finally:
        store.rm("/bucket", recursive=True)


def wait_for(done: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not done():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
