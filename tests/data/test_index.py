from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_atum.config.schema import FILTERS, SourceConfig
from megatron_atum.data import index as index_module
from megatron_atum.data.flags import mask_of
from megatron_atum.data.index import SourceIndex, open_source
from megatron_atum.data.manifest import Manifest, dropped, read_manifest
from megatron_atum.data.shards import DocumentRecord, PairRecord, write_shard
from megatron_atum.data.sidecar import Sidecar, build_sidecar, read_sidecar
from megatron_atum.data.storage import Storage
from megatron_atum.data.tokenizer import Tokenizer
from megatron_atum.errors import DataError
from tests.data.conftest import document_json, fake_index, fake_sidecar, write_index, write_members

WORDS = "some words that are long enough"
FILTERED = {  # key -> places; the flags are the filters that it meets
    "good": (None, WORDS, None),
    "text": (WORDS,),
    "last": (WORDS, None),
    "two": (WORDS, None, None),
    "three": (None, None, None, WORDS),
    "few": (None, "a", None),
    "special": (None, f"{WORDS} </s>", None),
    "tail": (WORDS, None, None, None),
}
MEETS = {
    **{"text": ["no_image"], "last": ["only_image_last"], "two": ["ends_with_two_images"]},
    **{"three": ["three_consecutive_images"], "few": ["few_tokens"], "special": ["special_token_in_text"]},
    "tail": ["ends_with_two_images", "three_consecutive_images"],
}


def source(pattern: Path, kind: str = "pairs", **changes: Any) -> SourceConfig:
    return SourceConfig("s", str(pattern), kind=kind, **changes)


def opened(config: SourceConfig, tokenizer: Tokenizer, filters: Any = ()) -> SourceIndex:
    return open_source(config, list(filters), tokenizer, Storage())


def keys(found: SourceIndex) -> list[str]:
    """Of the samples that are used."""
    places = [found.sample(number)[1:] for number in range(len(found))]
    return [sidecar.key(row) for sidecar, row in places if not int(sidecar.flags[row]) & found.drop_mask]


@pytest.fixture
def shards(tmp_path: Path, jpeg: bytes) -> Path:
    """Three shards of 3, 0 and 2 pairs."""
    for name, count in (("a", 3), ("b", 0), ("c", 2)):
        write_shard(tmp_path / f"{name}.tar", [PairRecord(f"{name}{n}", jpeg, f"caption {n}") for n in range(count)])
    return tmp_path


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filtered") / "0.tar"
    members = [("broken.json", b"{")]
    for key, places in FILTERED.items():
        members.append((f"{key}.json", document_json(*places)))
        members += [(f"{key}.{n:03d}.jpg", b"i") for n, place in enumerate(p for p in places if p is None)]
    write_members(path, *members)
    return path


def test_samples_are_numbered_through_all_shards(shards: Path, tokenizer: Tokenizer) -> None:
    found = opened(source(shards / "*.tar"), tokenizer)
    assert len(found) == found.usable == 5 and found.first_sample.tolist() == [0, 3, 3, 5]
    assert [found.locate(number) for number in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert keys(found) == ["a0", "a1", "a2", "c0", "c1"]
    assert found.images == 5 and found.tokens == sum(int(found.sidecar(shard).tokens.sum()) for shard in range(3))


@pytest.mark.parametrize("filters", [[], list(FILTERS), *([name] for name in FILTERS)])
def test_filters(filtered: Path, tokenizer: Tokenizer, filters: list[str], tmp_path: Path) -> None:
    """What is dropped is what meets a filter, in the samples as in the counts; faults always are."""
    found = opened(source(filtered, "documents"), tokenizer, filters)
    left_out = {key for key, names in MEETS.items() if set(names) & set(filters)}
    assert keys(found) == [key for key in FILTERED if key not in left_out]
    assert found.usable == len(FILTERED) - len(left_out)
    counts = found.dropped
    assert counts.pop("bad_json") == 1 and found.faults == 1
    assert sum(counts.values()) == len(left_out)
    first = {key: next(name for name in MEETS[key] if name in filters) for key in left_out}
    assert counts == {name: list(first.values()).count(name) for name in set(first.values())}
    sidecar = found.sidecar(0)
    used = [row for row in range(len(sidecar)) if not int(sidecar.flags[row]) & found.drop_mask]
    assert found.tokens == sidecar.tokens[used].sum() and found.images == sidecar.images[used].sum()


def test_filters_of_a_source_replace_those_of_all(filtered: Path, tokenizer: Tokenizer) -> None:
    all_of_them = list(FILTERS)
    assert keys(opened(source(filtered, "documents"), tokenizer, all_of_them)) == ["good"]
    assert len(keys(opened(source(filtered, "documents", filters=[]), tokenizer, all_of_them))) == len(FILTERED)
    one = opened(source(filtered, "documents", filters=["few_tokens"]), tokenizer, all_of_them)
    assert set(FILTERED) - set(keys(one)) == {"few"}


def test_counts_are_those_of_the_manifest(filtered: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copy(filtered, tmp_path / "0.tar")
    write_index(tmp_path / "*.tar", "documents", tokenizer, tmp_path / "m.json")
    found = opened(source(tmp_path / "m.json", "documents"), tokenizer, FILTERS)
    entries = read_manifest(str(tmp_path / "m.json"), Storage()).shards
    assert found.dropped == dropped(entries, found.drop_mask)
    assert (found.usable, found.tokens, found.images) == entries[0].used(found.drop_mask)
    assert found.usable + sum(found.dropped.values()) == entries[0].samples == len(FILTERED) + 1


def test_pairs_have_no_document_filters(shards: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    write_shard(shards / "d.tar", [PairRecord("d", jpeg, "</s> a caption"), PairRecord("e", jpeg, "x")])
    found = opened(source(shards / "*.tar"), tokenizer, FILTERS)
    assert found.dropped == {"special_token_in_text": 1} and "e" in keys(found)
    assert opened(source(shards / "*.tar"), tokenizer).dropped == {}


def test_three_ways_to_the_same_index(shards: Path, tokenizer: Tokenizer) -> None:
    in_memory = opened(source(shards / "*.tar"), tokenizer)
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    by_sidecars = opened(source(shards / "*.tar"), tokenizer)
    by_manifest = opened(source(shards / "m.json"), tokenizer)
    for found in (by_sidecars, by_manifest):
        assert found.digest() == in_memory.digest() and found.shards == in_memory.shards
        assert keys(found) == keys(in_memory)
        assert [found.sample(n)[1].sample_ids(found.sample(n)[2]).tolist() for n in range(5)] == [
            in_memory.sample(n)[1].sample_ids(in_memory.sample(n)[2]).tolist() for n in range(5)
        ]


def test_digest_follows_content_not_place(shards: Path, tokenizer: Tokenizer, jpeg: bytes, tmp_path: Path) -> None:
    found = opened(source(shards / "*.tar"), tokenizer).digest()
    shutil.copytree(shards, tmp_path / "moved" / "to")
    assert opened(source(tmp_path / "moved" / "to" / "*.tar"), tokenizer).digest() == found
    others = [
        opened(source(shards / "*.tar", max_images=9), tokenizer),
        opened(source(shards / "*.tar"), tokenizer, ["few_tokens"]),
        opened(SourceConfig("t", str(shards / "*.tar"), kind="pairs"), tokenizer),
        opened(source(shards / "[ab].tar"), tokenizer),
    ]
    write_shard(shards / "c.tar", [PairRecord(f"c{n}", jpeg, f"caption {n + 1}") for n in range(2)])
    others.append(opened(source(shards / "*.tar"), tokenizer))
    assert len({found, *(other.digest() for other in others)}) == len(others) + 1


def test_digest_does_not_depend_on_the_order_of_the_filters(shards: Path, tokenizer: Tokenizer) -> None:
    one, other = (opened(source(shards / "*.tar"), tokenizer, filters) for filters in (FILTERS, FILTERS[::-1]))
    assert one.digest() == other.digest()


def test_a_sidecar_that_does_not_fit_is_not_used(shards: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer)
    write_shard(shards / "a.tar", [PairRecord(f"new{n}", jpeg * 9, "text") for n in range(40)])
    (shards / "c.tar.index.safetensors").write_bytes(b"damaged")
    found = opened(source(shards / "*.tar"), tokenizer)
    assert keys(found)[0] == "new0" and len(found) == 42
    with pytest.raises(DataError, match=r"source s has no usable sample \(missing_part: 42\)"):
        opened(source(shards / "*.tar", "documents"), tokenizer)  # sidecars of another kind


def test_a_shard_rewritten_at_the_same_size_is_indexed_anew(shards: Path, tokenizer: Tokenizer, jpeg: bytes) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer)
    size = (shards / "c.tar").stat().st_size
    write_shard(shards / "c.tar", [PairRecord(f"d{n}", jpeg, f"another text {n}") for n in range(2)])
    assert (shards / "c.tar").stat().st_size == size
    later = (shards / "c.tar.index.safetensors").stat().st_mtime + 10
    os.utime(shards / "c.tar", (later, later))
    assert keys(opened(source(shards / "*.tar"), tokenizer))[-2:] == ["d0", "d1"]


class OtherTokenizer(Tokenizer):
    """The same pieces under another name."""

    def __init__(self, one: Tokenizer) -> None:
        super().__init__(one.model, one.vocab_size)
        self.sha256 = "0123456789abcdef"


def test_another_tokenizer(shards: Path, tokenizer: Tokenizer) -> None:
    write_index(shards / "*.tar", "pairs", OtherTokenizer(tokenizer), shards / "m.json")
    found = opened(source(shards / "*.tar"), tokenizer)  # indexed anew
    assert found.sidecar(0).info.tokenizer_sha256 == tokenizer.sha256
    with pytest.raises(DataError, match=r"m\.json was made with another tokenizer \(0123456789ab, data\.tokenizer"):
        opened(source(shards / "m.json"), tokenizer)


def test_another_kind_than_the_manifest(shards: Path, tokenizer: Tokenizer) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    with pytest.raises(DataError, match=r"source s: .*m\.json holds pairs, but kind is documents; correct"):
        opened(source(shards / "m.json", "documents"), tokenizer)


def test_sidecars_of_a_manifest_are_checked_when_they_are_used(shards: Path, tokenizer: Tokenizer) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    found = opened(source(shards / "m.json"), tokenizer)
    shutil.copy(shards / "c.tar.index.safetensors", shards / "a.tar.index.safetensors")
    with pytest.raises(DataError, match=r"a\.tar\.index\.safetensors is not the one its manifest was made with"):
        found.sidecar(0)
    (shards / "a.tar.index.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.tar\.index\.safetensors is no sidecar"):
        found.sidecar(0)
    (shards / "a.tar.index.safetensors").unlink()
    with pytest.raises(DataError, match=r"a\.tar\.index\.safetensors is missing; make it again"):
        found.sidecar(0)
    assert found.sidecar(2).key(0) == "c0"


def test_a_sidecar_with_as_many_samples_and_other_flags_is_seen(shards: Path, tokenizer: Tokenizer) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    found = opened(source(shards / "m.json"), tokenizer)
    place = shards / "a.tar.index.safetensors"
    sidecar = read_sidecar(str(place), Storage())
    other = Sidecar(sidecar.info, {**sidecar.arrays, "flags": sidecar.flags ^ np.uint16(1 << 9)})
    place.unlink()
    place.write_bytes(other.to_bytes())
    with pytest.raises(DataError, match=r"a\.tar\.index\.safetensors is not the one its manifest was made with"):
        found.sidecar(0)


def test_few_sidecars_are_open(shards: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "OPEN_SIDECARS", 2)
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    found = opened(source(shards / "m.json"), tokenizer)
    first = found.sidecar(0)
    for shard in (1, 0, 2, 0):
        found.sidecar(shard)
        assert len(found._open) <= 2
    assert found.sidecar(0) is first  # the one that was not used for longest goes first


def test_a_copy_for_another_process_opens_its_own_files(shards: Path, tokenizer: Tokenizer) -> None:
    in_memory = opened(source(shards / "*.tar"), tokenizer)
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    mapped = opened(source(shards / "m.json"), tokenizer)
    for found in (in_memory, mapped):
        before = keys(found)
        copy = pickle.loads(pickle.dumps(found))
        assert not copy._open and keys(copy) == before and copy.digest() == found.digest()
    assert mapped._open


def test_no_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"source s: no shard matches .*\*\.tar; correct the source's `shards`"):
        opened(source(tmp_path / "*.tar"), tokenizer)


def test_no_usable_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_members(tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"source s has no usable sample \(its shards are empty\)"):
        opened(source(tmp_path / "*.tar"), tokenizer)
    write_members(tmp_path / "0.tar", ("a.json", document_json(WORDS)), ("b.json", b"{"))
    with pytest.raises(DataError, match=r"no usable sample \(bad_json: 1, no_image: 1\); .* data\.filters"):
        opened(source(tmp_path / "*.tar", "documents"), tokenizer, FILTERS)
    assert len(keys(opened(source(tmp_path / "*.tar", "documents"), tokenizer))) == 1


def test_damaged_shards_are_counted_and_used_as_far_as_they_go(shards: Path, tokenizer: Tokenizer) -> None:
    data = (shards / "a.tar").read_bytes()
    (shards / "a.tar").write_bytes(data[: data.index(b"a2.txt") + 512])
    found = opened(source(shards / "*.tar"), tokenizer)
    assert keys(found) == ["a0", "a1", "c0", "c1"]
    assert found.dropped == {"cut_off": 1, "truncated_tar": 1} and found.faults == 1


def test_large_data_sets_need_an_index(shards: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (shards / "a.tar").stat().st_size
    monkeypatch.setattr(index_module, "MAX_IN_MEMORY_BYTES", size)
    with pytest.raises(DataError, match=r"source s: .*; make one with tools/data/index\.py"):
        opened(source(shards / "*.tar"), tokenizer)
    assert len(opened(source(shards / "a.tar"), tokenizer)) == 3
    write_index(shards / "*.tar", "pairs", tokenizer)
    assert len(opened(source(shards / "*.tar"), tokenizer)) == 5


def test_text_only_documents_may_be_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "0.tar", [DocumentRecord("d", [WORDS], [None])])
    found = opened(source(tmp_path / "*.tar", "documents"), tokenizer)
    assert (found.usable, found.images) == (1, 0)


def test_unfinished_files_are_no_shards(shards: Path, tokenizer: Tokenizer) -> None:
    (shards / "a.tar.1.tmp").write_bytes(b"x")
    assert len(opened(source(shards / "a.tar*"), tokenizer)) == 3


def test_faults_are_told_from_what_is_filtered() -> None:
    flags = [0, *(mask_of([name]) for name in ("bad_json", "no_text", "few_tokens", "duplicate_key"))]
    found = fake_index("s", [fake_sidecar("documents", [9] * 5, [[]] * 5, flags)], filters=["few_tokens"])
    assert found.faults == 2 and sum(found.dropped.values()) == 4 and found.usable == 1


def test_a_manifest_without_its_shards_opens(shards: Path, tokenizer: Tokenizer) -> None:
    """A run knows all of a source before it opens any shard."""
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    for path in [*shards.glob("*.tar"), *shards.glob("*.index.safetensors")]:
        path.unlink()
    assert opened(source(shards / "m.json"), tokenizer).usable == 5


def test_entries_are_those_of_their_sidecars(shards: Path, tokenizer: Tokenizer) -> None:
    write_index(shards / "*.tar", "pairs", tokenizer, shards / "m.json")
    manifest = read_manifest(str(shards / "m.json"), Storage())
    assert isinstance(manifest, Manifest) and manifest.kind == "pairs"
    for one in manifest.shards:
        assert one.index_sha256 == build_sidecar(one.path, "pairs", tokenizer, Storage()).digest()
