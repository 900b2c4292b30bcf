import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_atum.config.schema import SourceConfig
from megatron_atum.data.index import SourceIndex, build_index
from megatron_atum.data.shards import DocumentRecord, PairRecord, ShardReader, write_shard
from megatron_atum.data.tokenizer import IMAGE_TOKEN, Tokenizer
from megatron_atum.errors import DataError


def write_members(path: Path, *members: tuple[str, bytes]) -> None:
    """A tar as someone else might write it."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def document(texts: list[str | None], images: list[str | None]) -> bytes:
    return json.dumps({"version": 1, "texts": texts, "images": images}).encode()


def index(folder: Path, tokenizer: Tokenizer, kind: str, max_images: int = 3, length: int = 64) -> SourceIndex:
    return build_index(SourceConfig("s", str(folder / "*.tar"), 1.0, kind, max_images), tokenizer, length)


def test_arrays_point_at_the_members(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes):
    write_shard(tmp_path / "0.tar", [DocumentRecord("d0", ["a", None], [None, jpeg])])
    records = [
        DocumentRecord("d1", [None, "b", None], [jpeg + b"1", None, jpeg + b"2"]),
        DocumentRecord("d2", ["c"], [None]),
    ]
    write_shard(tmp_path / "1.tar", records)
    found = index(tmp_path, tokenizer, "documents")
    assert [found.location(i)[1] for i in range(3)] == ["d0", "d1", "d2"]
    assert found.shard.tolist() == [0, 1, 1] and found.images.tolist() == [1, 2, 0]
    text_tokens = [len(tokenizer.encode(text)) for text in "abc"]
    assert found.tokens.tolist() == [2 + 3 + text_tokens[0], 2 + 6 + text_tokens[1], 2 + text_tokens[2]]
    reader = ShardReader()
    text, *images = [reader.read(found.location(1)[0], member) for member in found.members(1)]
    assert json.loads(text)["texts"] == [None, "b", None] and images == [jpeg + b"1", jpeg + b"2"]
    assert found.faults == {} and found.dropped == 0


def test_images_follow_the_text_not_the_tar(tmp_path: Path, tokenizer: Tokenizer):
    text = document([None, "x", None], ["001.jpg", None, "000.jpg"])
    write_members(tmp_path / "0.tar", ("d.json", text), ("d.000.jpg", b"zero"), ("d.001.jpg", b"one"))
    found = index(tmp_path, tokenizer, "documents")
    path = found.location(0)[0]
    assert [ShardReader().read(path, member) for member in found.members(0)[1:]] == [b"one", b"zero"]


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("missing_part", [("k.jpg", b"i")]),
        ("missing_part", [("k.txt", b"t")]),
        ("missing_part", [("README", b"t")]),
        ("image_count_mismatch", [("k.jpg", b"i"), ("k.png", b"i"), ("k.txt", b"t")]),
        ("not_utf8", [("k.jpg", b"i"), ("k.txt", b"\xff")]),
        ("no_text", [("k.jpg", b"i"), ("k.txt", b" ")]),
        ("special_token_in_text", [("k.jpg", b"i"), ("k.txt", IMAGE_TOKEN.encode())]),
        ("special_token_in_text", [("k.jpg", b"i"), ("k.txt", b"a </s> b")]),
        ("too_long", [("k.jpg", b"i"), ("k.txt", b"word " * 80)]),
        ("duplicate_key", [("good.jpg", b"i"), ("good.txt", b"t")]),
    ],
)
def test_pair_faults_are_counted(tmp_path: Path, tokenizer: Tokenizer, reason: str, members: list[tuple[str, bytes]]):
    write_members(tmp_path / "0.tar", ("good.jpg", b"i"), ("good.txt", b"fine"))
    write_members(tmp_path / "1.tar", *members, ("last.jpg", b"i"), ("last.txt", b"fine"))
    found = index(tmp_path, tokenizer, "pairs")
    assert found.faults == {reason: 1} and found.dropped == 1
    assert found.keys.tolist() == [b"good", b"last"]


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("missing_part", [("k.000.jpg", b"i")]),
        ("missing_part", [("k.json", document([None, "t"], ["000.jpg", None]))]),
        ("image_count_mismatch", [("k.json", document(["t"], [None])), ("k.000.jpg", b"i")]),
        ("bad_json", [("k.json", b"{")]),
        ("not_utf8", [("k.json", b'{"texts": ["\xff"]}')]),
        ("no_text", [("k.json", document([None], ["000.jpg"])), ("k.000.jpg", b"i")]),
        ("too_many_images", [("k.json", document([None] * 4 + ["t"], ["0.jpg"] * 4 + [None])), ("k.0.jpg", b"i")]),
        ("too_long", [("k.json", document(["word " * 80], [None]))]),
    ],
)
def test_document_faults_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, reason: str, members: list[tuple[str, bytes]]
):
    write_members(tmp_path / "0.tar", *members, ("last.json", document(["fine"], [None])))
    found = index(tmp_path, tokenizer, "documents")
    assert found.faults == {reason: 1}
    assert found.keys.tolist() == [b"last"]


def test_longest_sample_that_fits(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes):
    text = "some words that make a caption"
    write_shard(tmp_path / "0.tar", [PairRecord("k", jpeg, text)])
    tokens = 5 + len(tokenizer.encode(text))
    assert index(tmp_path, tokenizer, "pairs", length=tokens).tokens.tolist() == [tokens]
    with pytest.raises(DataError, match=r"source s .* has no usable sample \(too_long: 1\)"):
        index(tmp_path, tokenizer, "pairs", length=tokens - 1)


def test_lost_images_are_counted_apart(tmp_path: Path, tokenizer: Tokenizer):
    write_shard(tmp_path / "0.tar", [DocumentRecord("d", ["a", None], [None, None], missing={1: "404"})])
    found = index(tmp_path, tokenizer, "documents")
    assert (len(found), found.lost_images, found.dropped) == (1, 1, 0)


def test_damaged_shard_names_the_file(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes):
    path = tmp_path / "0.tar"
    write_shard(path, [PairRecord(f"k{i}", jpeg, "t") for i in range(4)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"0\.tar is .* again"):
        index(tmp_path, tokenizer, "pairs")


def test_missing_shards_and_unknown_kind(tmp_path: Path, tokenizer: Tokenizer):
    with pytest.raises(DataError, match="no shard matches"):
        index(tmp_path, tokenizer, "pairs")
    with pytest.raises(DataError, match="use one of documents, pairs"):
        index(tmp_path, tokenizer, "images")


def test_digest_follows_content_not_place(tmp_path: Path, tokenizer: Tokenizer, jpeg: bytes):
    (tmp_path / "a").mkdir()
    write_shard(tmp_path / "a" / "0.tar", [PairRecord("k1", jpeg, "one"), PairRecord("k2", jpeg, "two")])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = index(tmp_path / "a", tokenizer, "pairs")
    assert index(tmp_path / "b", tokenizer, "pairs").digest() == found.digest()
    for changes in ({"tokens": found.tokens + 1}, {"keys": np.flip(found.keys)}, {"max_images": 9}, {"name": "t"}):
        assert dataclasses.replace(found, **changes).digest() != found.digest()
