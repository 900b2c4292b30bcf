"""What each published form gives, row by row: drafts, and reasons for what is dropped."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.data.converters.documents import Documents
from megatron_atum.data.converters.drafts import DocumentDraft, Dropped, LocalFile, Lost, PairDraft, Url
from megatron_atum.data.converters.img2dataset import Img2dataset, _unique
from megatron_atum.data.converters.local import local_or_url
from megatron_atum.data.converters.obelics import Obelics
from megatron_atum.data.converters.parts import END, Part, find_parts
from megatron_atum.data.converters.pmd import Pmd
from megatron_atum.errors import DataError
from tests.data.converters.files import (
    jpeg,
    laion_members,
    obelics_row,
    write_arrow,
    write_jsonl,
    write_parquet,
    write_tar,
)

URL = "http://a.example/cat.jpg"


def part_of(path: Path) -> Part:
    return Part("part", str(path), path.stat().st_size)


def outcome(draft: Any) -> Any:
    return draft.reason if isinstance(draft, Dropped) else draft


# OBELICS ---------------------------------------------------------------------------------------------------------


def test_an_obelics_document_keeps_the_order_the_page_and_the_urls(tmp_path: Path) -> None:
    row = obelics_row(["<s> one", None, None, "two"], [None, URL, "", None])
    path = write_parquet(tmp_path / "a.parquet", [row], "obelics")
    (draft,) = Obelics().read(part_of(path))
    assert draft == DocumentDraft(
        "part-0000000",
        ["<s> one", None, None, "two"],
        [None, Url(URL), Lost("bad_url"), None],
        "obelics",
        {"url": "http://page.example/1", "warc_record_length": 9, "image_urls": {"1": URL, "2": ""}},
    )


def test_malformed_obelics_rows_are_dropped_by_reason(tmp_path: Path) -> None:
    good = obelics_row(["a", None], [None, URL])
    rows: list[tuple[dict[str, Any], str]] = [
        ({"texts": ["a"]}, "unequal_lengths"),
        ({"metadata": "[null]"}, "unequal_lengths"),
        ({"texts": ["a", "b"]}, "both_set"),
        ({"texts": [None, None]}, "none_set"),
        ({"texts": None}, "not_lists"),
        ({"metadata": "[null,"}, "bad_json"),
        ({"general_metadata": None}, "bad_json"),
        ({"general_metadata": "[]"}, "bad_json"),
        ({"metadata": "{}"}, "bad_json"),
        ({"metadata": "[" * 10_000}, "bad_json"),
    ]
    path = write_parquet(tmp_path / "a.parquet", [good, *(good | change for change, _ in rows)], "obelics")
    first, *others = Obelics().read(part_of(path))
    assert isinstance(first, DocumentDraft)
    assert [outcome(draft) for draft in others] == [reason for _, reason in rows]


def test_a_lost_image_keeps_its_place_with_the_reason() -> None:
    draft = DocumentDraft("k", ["a", None, None, "b"], [None, Url(URL), Url(URL), None], "web", {"x": 1})
    record = draft.finish([Lost("http_404"), jpeg()])
    assert not isinstance(record, Dropped)
    assert record.images == [None, None, jpeg(), None] and record.missing == {1: "http_404"}
    assert draft.finish([Lost("http_404"), Lost("dns")]) == Dropped("all_images_lost")
    assert DocumentDraft("k", ["a"], [None], "web").finish([]) == Dropped("no_image")
    kept = DocumentDraft("k", ["a"], [None], "web", require_image=False).finish([])
    assert not isinstance(kept, Dropped)


def test_half_a_surrogate_pair_cannot_be_written_and_is_dropped() -> None:
    assert DocumentDraft("k", ["\ud800", None], [None, b"i"], "web").finish([jpeg()]) == Dropped("bad_unicode")
    assert DocumentDraft("k", [None], [b"i"], "web", {"a": "\ud800"}).finish([jpeg()]) == Dropped("bad_unicode")
    assert PairDraft("k", b"i", "\ud800").finish([jpeg()]) == Dropped("bad_unicode")


# Documents --------------------------------------------------------------------------------------------------------


def test_both_forms_of_documents(tmp_path: Path) -> None:
    rows = [
        {"texts": ["a", None], "images": [None, "cat.jpg"], "id": 7, "meta": {"url": "u"}},
        {"parts": [{"text": "a"}, {"image": "cat.jpg"}], "meta": "free"},
        {"parts": [{"image": URL}, {"image": ""}]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    one, two, three = Documents("wiki").read(part_of(path))
    cat = LocalFile(str(tmp_path), "cat.jpg")
    assert one == DocumentDraft("part-0000000", ["a", None], [None, cat], "wiki", {"id": 7, "url": "u"})
    assert two == DocumentDraft("part-0000001", ["a", None], [None, cat], "wiki", {"meta": "free"})
    assert isinstance(three, DocumentDraft) and three.images == [Url(URL), Lost("no_such_file")]
    (one, *_) = Documents(images="/elsewhere").read(part_of(path))
    assert isinstance(one, DocumentDraft) and one.images[1] == LocalFile("/elsewhere", "cat.jpg")


def test_malformed_documents_are_dropped_by_reason(tmp_path: Path) -> None:
    rows: list[tuple[Any, str]] = [
        ("{", "bad_json"),
        ({}, "not_lists"),
        ({"texts": [1], "images": [None]}, "not_texts"),
        ({"parts": [{"text": "a", "image": "b"}]}, "bad_parts"),
        ({"parts": [{}]}, "bad_parts"),
        ({"parts": "a"}, "bad_parts"),
        ({"parts": [{"text": 1}]}, "not_texts"),
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [row for row, _ in rows])
    assert [outcome(draft) for draft in Documents().read(part_of(path))] == [reason for _, reason in rows]


# PMD --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_pmd(tmp_path: Path, kind: str) -> None:
    image = {"bytes": jpeg(), "path": None}
    rows = [
        {"image": image, "image_url": None, "text": "a cat", "source": "coco", "meta": '{"id": 1}'},
        {"image": None, "image_url": URL, "text": "a dog", "source": "red_caps", "meta": "{broken"},
        {"image": {"bytes": None, "path": "/home/x.jpg"}, "text": "b", "source": "coco"},
        {"image": image, "text": "c", "source": "sbu"},
        {"image": image, "text": " ", "source": "coco"},
    ]
    write = write_parquet if kind == "parquet" else write_arrow
    path = part_of(write(tmp_path / f"a.{kind}", rows, "pmd"))
    first, second, *others = Pmd(("sbu",), fetches=True).read(path)
    assert first == PairDraft("part-0000000", jpeg(), "a cat", {"source": "coco", "meta": {"id": 1}})
    meta = {"source": "red_caps", "image_url": URL, "meta": "{broken"}
    assert second == PairDraft("part-0000001", Url(URL), "a dog", meta)
    assert [outcome(draft) for draft in others] == ["no_image", "excluded_source", "no_text"]
    assert [outcome(draft) for draft in Pmd().read(path)][1] == "no_image"


# img2dataset ------------------------------------------------------------------------------------------------------


def tar_of(folder: Path, members: list[tuple[str, bytes]], **stats: int) -> Part:
    path = write_tar(folder / "00007.tar", members, stats or None)
    return Part("00007", str(path), path.stat().st_size)


def test_img2dataset_keeps_the_key_and_what_was_known(tmp_path: Path) -> None:
    part = tar_of(tmp_path, laion_members("000070003", similarity=0.3), count=5, successes=1)
    draft, failed = Img2dataset().read(part)
    meta = {"url": "http://x.example/000070003.jpg", "sha256": "0" * 64, "original_width": 480, "similarity": 0.3}
    assert draft == PairDraft("000070003", jpeg(), "a picture", meta)
    assert failed == Dropped("img2dataset_failed", 4)


def test_img2dataset_without_txt_or_json(tmp_path: Path) -> None:
    image, txt, facts = laion_members("000070000")
    part = tar_of(tmp_path, [image, facts, ("other.png", jpeg()), ("other.txt", b"words")])
    first, second = Img2dataset().read(part)
    assert isinstance(first, PairDraft) and first.text == "a picture"
    # A key that does not begin with the number of its tar may be there in another one as well.
    assert second == PairDraft("00007+other", jpeg(), "words", None)


def test_img2dataset_keys_of_different_parts_differ() -> None:
    parts = ["1", "11", "00001", "000011", "a", "ab", "a-b", "a-", "x-1", "x"]
    keys = ["1", "11", "112", "000010", "00001000", "000010000", "000011000", "0000110000", "100001", "110001"]
    keys += ["abx", "b-c", "c", "b", "1-1", "a", "\u0661\u0661\u0661\u0661\u0661"]
    made = [_unique(part, key) for part in parts for key in keys]
    assert len(set(made)) == len(parts) * len(keys)
    kept = {(part, key) for part in parts for key in keys if _unique(part, key) == key}
    assert kept == {("00001", "000010000"), ("00001", "000011000"), ("000011", "0000110000"), ("11", "110001")}


def test_img2dataset_drops_by_reason(tmp_path: Path) -> None:
    image, txt, facts = laion_members("x")
    bad_status = json.dumps({"status": "failed_to_resize"}).encode()
    members = [
        *laion_members("a"),
        ("b.txt", b"no image"),
        *laion_members("c", caption=" "),
        ("d.jpg", image[1]),
        ("d.txt", b"d"),
        ("d.json", b"{"),
        ("e.jpg", image[1]),
        ("e.txt", b"e"),
        ("e.json", bad_status),
        ("f.jpg", image[1]),
        ("f.txt", b"\xff\xfe"),
        ("g.jpg", image[1]),
        ("g.png", image[1]),
        ("a.jpg", image[1]),
        ("a.txt", b"again"),
        ("_h.jpg", image[1]),
        ("README", b"no sample"),
    ]
    got = [outcome(draft) for draft in Img2dataset().read(tar_of(tmp_path, members))]
    assert isinstance(got[0], PairDraft)
    expected = ["no_image", "no_text", "bad_json", "status_not_success", "bad_unicode", "several_images"]
    assert got[1:] == [*expected, "duplicate_key", "bad_key", "no_image"]


@pytest.mark.parametrize("where", ["in_content", "in_padding_of_the_last_whole_member", "at_a_header", "in_a_header"])
def test_a_cut_tar_keeps_what_is_complete_and_counts_the_rest(tmp_path: Path, where: str) -> None:
    members = [member for i in range(6) for member in laion_members(f"00007000{i}", i)]
    part = tar_of(tmp_path, members, count=6, successes=6)
    header = Path(part.path).read_bytes().index(b"000070003.txt")
    size = {"in_content": -100, "in_padding_of_the_last_whole_member": 0, "at_a_header": 0, "in_a_header": 200}[where]
    with open(part.path, "r+b") as stream:
        stream.truncate(header + size if where != "in_padding_of_the_last_whole_member" else header - 1)
    *kept, rest = Img2dataset().read(part)
    assert [draft.key for draft in kept] == ["000070000", "000070001", "000070002"]  # type: ignore[union-attr]
    assert rest == Dropped("truncated_tar", 3)


def test_a_tar_damaged_in_the_middle_is_noticed(tmp_path: Path) -> None:
    part = tar_of(tmp_path, [member for i in range(6) for member in laion_members(f"00007000{i}", i)])
    content = bytearray(Path(part.path).read_bytes())
    header = content.index(b"000070003.txt")
    content[header : header + 512] = b"\x55" * 512
    Path(part.path).write_bytes(content)
    *kept, rest = Img2dataset().read(part)
    assert len(kept) == 3 and rest == Dropped("truncated_tar", 1)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "00001.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"00001\.tar"):
        list(Img2dataset().read(part_of(path)))


def test_what_a_path_may_be() -> None:
    embedded = "data:image/jpeg;base64," + base64.b64encode(jpeg()).decode()
    for path, found in (
        ("a/b.jpg", LocalFile("pics", "a/b.jpg")),
        ("mydata:1.jpg", LocalFile("pics", "mydata:1.jpg")),
        ("", Lost("no_such_file")),
        (URL, Url(URL)),
        ("HTTP://a.example/cat.jpg", Url("HTTP://a.example/cat.jpg")),
        (embedded, jpeg()),
        (embedded.replace("data:image", "DATA:image").replace("+", "%2B"), jpeg()),
        ("data:image/png;base64,@@", Lost("bad_url")),
        ("data:image/svg+xml,<svg/>", Lost("unsupported_url")),
        ("file:///etc/cat.jpg", Lost("unsupported_url")),
        ("s3://bucket/cat.jpg", Lost("unsupported_url")),
    ):
        assert local_or_url("pics", path) == found, path


# Parts ------------------------------------------------------------------------------------------------------------


def test_a_fingerprint_tells_a_changed_file_but_not_a_moved_one(tmp_path: Path) -> None:
    content = bytearray(jpeg(seed=3) * 500)
    path, other = tmp_path / "a", tmp_path / "b"
    path.write_bytes(content)
    other.write_bytes(content)
    os.utime(other, (1, 1))
    assert len(content) > 3 * END and part_of(path).fingerprint() == part_of(other).fingerprint()
    for place in (0, END - 1, -1, -END):
        changed = content.copy()
        changed[place] ^= 1
        other.write_bytes(changed)
        assert part_of(path).fingerprint() != part_of(other).fingerprint()
    other.write_bytes(b"")
    part = part_of(other)
    assert part.fingerprint()["bytes"] == 0
    other.unlink()
    with pytest.raises(DataError, match=r"b cannot be read .*restore it"):
        part.fingerprint()


def test_parts_are_named_after_the_folder_or_glob_given(tmp_path: Path) -> None:
    for name in ("b/train-1.v2.parquet", "b/cache-1.parquet", "a/_x.parquet", "a/.hidden.parquet", "a/state.json"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    names = ["a-_x", "b-train-1-v2"]
    for given in ("in", "in/*/*.parquet", "in/**/*.parquet"):
        assert [part.name for part in find_parts([str(tmp_path / given)], (".parquet",))] == names
    (part,) = find_parts([str(tmp_path / "in/b/train-1.v2.parquet")] * 2, (".parquet",))
    assert part.key(12) == "train-1-v2-0000012"


def test_nothing_below_the_output_is_an_input(tmp_path: Path) -> None:
    for name in ("in/a.json", "in/out/b.json", "in/out/deep/c.json", "in/outer/d.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "out")
    named = [str(path) for path in (tmp_path / "in").rglob("*.json")]  # as the shell spells a glob out
    for out in ("in/out", "in/x/../out/", "link"):
        for given in ([str(tmp_path / "in")], [str(tmp_path / "in/**/*.json")], named):
            found = find_parts(given, (".json",), str(tmp_path / out))
            assert sorted(os.path.basename(part.path) for part in found) == ["a.json", "d.json"]
    with pytest.raises(DataError, match=r"in/out/b\.json lies in --out .*; choose another --out"):
        find_parts([str(tmp_path / "in/out")], (".json",), str(tmp_path / "in"))


def test_bad_inputs_are_named(tmp_path: Path) -> None:
    for name in ("a/1.parquet", "b/1.parquet", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("no", "does not exist"),
        ("empty", "holds no file"),
        ("*.tar", "holds no file"),
        ("c.txt", "no file of"),
    ):
        with pytest.raises(DataError, match=message):
            find_parts([str(tmp_path / given)], (".parquet",))
    with pytest.raises(DataError, match="would both be called 1"):
        find_parts([str(tmp_path / "a"), str(tmp_path / "b")], (".parquet",))
