"""Records of conversations, in the forms that others publish: turns, places of images, and why a record is dropped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.data.converters.conversations import Conversations
from megatron_atum.data.converters.drafts import ConversationDraft, Dropped, LocalFile, Lost, Url
from megatron_atum.data.converters.parts import Part
from megatron_atum.data.shards import ConversationRecord
from megatron_atum.errors import DataError
from tests.data.converters.files import write_jsonl


def part_of(path: Path) -> Part:
    return Part("part", str(path), path.stat().st_size)


def read(path: Path, rows: list[Any], images: str | None = "pics") -> list[Any]:
    """Turns of each draft, or the reason why there is none."""
    drafts = Conversations("mine", images).read(part_of(write_jsonl(path / "a.jsonl", rows)))
    return [draft.reason if isinstance(draft, Dropped) else draft.turns for draft in drafts]


def llava(*values: str, **changes: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    turns = [{"from": speakers[n % 2], "value": value} for n, value in enumerate(values)]
    return {"conversations": turns, **changes}


def chat(*contents: Any, **changes: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": value} for n, value in enumerate(contents)], **changes}


def file(path: str) -> LocalFile:
    return LocalFile("pics", path)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (  # LLaVA: the image before or behind the question, white space around it falls away
            llava("<image>\nWhat is it?", " A cat. ", "Sure?", "Yes.", image="a.jpg"),
            [("user", [file("a.jpg"), "What is it?"]), ("assistant", ["A cat."]), ("user", ["Sure?"])],
        ),
        (llava("What is it?\n<image>", "A cat.", image="a.jpg"), [("user", ["What is it?", file("a.jpg")])]),
        (llava("no place", "A cat.", image="a.jpg"), [("user", [file("a.jpg"), "no place"])]),
        (llava("no place", "A cat.", image=["a.jpg", "b.jpg"]), [("user", [file("a.jpg"), file("b.jpg"), "no place"])]),
        (
            llava("<image> or <image>?", "Two. <image>", image=["a.jpg", "b.jpg", "http://x.example/c.jpg"]),
            [
                ("user", [file("a.jpg"), "or", file("b.jpg"), "?"]),
                ("assistant", ["Two.", Url("http://x.example/c.jpg")]),
            ],
        ),
        (llava("Hello", "Good day.", image=None), [("user", ["Hello"])]),
        (llava("Hello", "Good day.", image="", images=[]), [("user", ["Hello"])]),
        (llava("", "A cat.", image="a.jpg"), [("user", [file("a.jpg")])]),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    *llava("a", "b", image="a.jpg")["conversations"],
                ]
            }
            | {"image": "a.jpg"},
            [("system", ["Be kind."]), ("user", [file("a.jpg"), "a"])],
        ),
        (  # chat messages
            chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}], "A cat."),
            [("user", [file("a.jpg"), "What?"])],
        ),
        (
            chat([{"type": "text", "text": "What?"}, {"type": "image"}], "A cat.", images=["a.jpg"]),
            [("user", ["What?", file("a.jpg")])],
        ),
        (
            chat([{"type": "image_url", "image_url": {"url": "https://x.example/a.jpg"}}], "A cat."),
            [("user", [Url("https://x.example/a.jpg")])],
        ),
        (chat("<image>What?", "A cat.", images=[{"path": "a.jpg"}]), [("user", [file("a.jpg"), "What?"])]),
        (  # an image of the content and one of the record
            chat([{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "<image>"}], "Two.", images=["b.jpg"]),
            [("user", [file("a.jpg"), file("b.jpg")])],
        ),
        (chat("What?", [{"type": "text", "text": "A cat."}]), [("user", ["What?"]), ("assistant", ["A cat."])]),
        (  # what is null is not there
            {
                "conversations": None,
                "messages": [
                    {"from": None, "role": role, "value": None, "content": "a"} for role in ("user", "assistant")
                ],
            }
            | {"data": None, "image": None},
            [("user", ["a"])],
        ),
        ({"conversations": None, "messages": None, "data": ["a", "b"]}, [("user", ["a"]), ("assistant", ["b"])]),
        ({"data": ["a", "b", "c", "d"]}, [("user", ["a"]), ("assistant", ["b"]), ("user", ["c"])]),
    ],
)
def test_turns(tmp_path: Path, row: dict[str, Any], turns: list[Any]) -> None:
    (found,) = read(tmp_path, [row])
    assert found[: len(turns)] == turns and found[-1][0] == "assistant"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken", "bad_json"),
        ("[]", "bad_json"),
        ({}, "no_turns"),
        ({"conversations": []}, "no_turns"),
        ({"conversations": ["a"]}, "no_turns"),
        ({"messages": "a"}, "no_turns"),
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "unknown_role"),
        ({"conversations": [{"value": "a"}]}, "unknown_role"),
        (chat("a", "b", **{"data": ["c", "d"]}) | {"messages": [{"role": ["user"], "content": "a"}]}, "unknown_role"),
        (chat(5, "b"), "bad_content"),
        (chat(["a"], "b"), "bad_content"),
        (chat([{"type": "audio"}], "b"), "bad_content"),
        (chat([{"type": "text"}], "b"), "bad_content"),
        (chat([{"type": "image", "image": 5}], "b"), "bad_content"),
        ({"data": ["a", None]}, "bad_content"),
        (llava("a", " "), "empty_turn"),
        (llava("", "b"), "empty_turn"),
        (llava("a"), "no_answer"),
        ({"messages": [*chat("a", "b")["messages"], {"role": "system", "content": "c"}]}, "system_not_first"),
        (llava("<image>a", "b"), "image_count_mismatch"),
        (llava("<image><image>a", "b", image="a.jpg"), "image_count_mismatch"),
        (llava("<image>a", "b", image=["a.jpg", "b.jpg"]), "image_count_mismatch"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "image": "a.jpg"}, "image_count_mismatch"),
        (chat([{"type": "image", "image": "a.jpg"}, {"type": "image"}], "b"), "image_count_mismatch"),
        (llava("a", "b", image=5), "bad_images"),
        (llava("a", "b", image=[None]), "bad_images"),
    ],
)
def test_reasons(tmp_path: Path, row: Any, reason: str) -> None:
    assert read(tmp_path, [row]) == [reason]


def test_files_of_every_form(tmp_path: Path) -> None:
    """A JSON list, JSONL that is called JSON, and compressed JSONL; keys count all rows."""
    rows = [llava("a", "b", id="x"), {}, llava("c", "d")]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files = {"a.json": json.dumps(rows, indent=1).encode(), "b.json": lines, "c.jsonl.gz": gzip.compress(lines)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        first, bad, last = Conversations().read(part_of(tmp_path / name))
        assert isinstance(first, ConversationDraft) and isinstance(last, ConversationDraft)
        assert (first.key, first.meta, last.key, last.meta) == ("part-0000000", {"id": "x"}, "part-0000002", {})
        assert bad == Dropped("no_turns")
    for broken in (b"[1", b"["):
        (tmp_path / "a.json").write_bytes(broken)
        with pytest.raises(DataError, match=r"a\.json cannot be read"):
            list(Conversations().read(part_of(tmp_path / "a.json")))
    (tmp_path / "a.json").write_bytes(b"")
    assert list(Conversations().read(part_of(tmp_path / "a.json"))) == []


def test_lists_in_every_guise(tmp_path: Path) -> None:
    """With a byte order mark, compressed, and in front of neither."""
    bom = b"\xef\xbb\xbf"
    rows = [llava("a", "b", id="x"), llava("c", "d")]
    as_list, lines = json.dumps(rows).encode(), "".join(json.dumps(row) + "\n" for row in rows).encode()
    contents = [b"\n " + as_list, bom + as_list, bom + b"\n" + as_list, lines, bom + lines]
    for content in contents:
        (tmp_path / "a.json").write_bytes(content)
        (tmp_path / "a.json.gz").write_bytes(gzip.compress(content))
        for name in ("a.json", "a.json.gz"):
            drafts = list(Conversations().read(part_of(tmp_path / name)))
            assert [draft.meta for draft in drafts if isinstance(draft, ConversationDraft)] == [{"id": "x"}, {}], name


def test_deep_lists_are_an_error_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"[" * 200_000)
    with pytest.raises(DataError, match=r"a\.json cannot be read \(nested too deeply\)"):
        list(Conversations().read(part_of(tmp_path / "a.json")))


@pytest.mark.parametrize(
    ("spelt", "kept"),
    [
        ("7", {"id": 7}),
        ("1.5", {"id": 1.5}),
        ("NaN", {}),
        ("-Infinity", {}),
        ("[1]", {}),
        ("null", {}),
        ('"x"', {"id": "x"}),
    ],
)
def test_only_plain_ids_are_kept(tmp_path: Path, spelt: str, kept: dict[str, Any]) -> None:
    line = json.dumps(llava("a", "b"))[:-1] + f', "id": {spelt}}}'
    (found,) = Conversations().read(part_of(write_jsonl(tmp_path / "a.jsonl", [line])))
    assert isinstance(found, ConversationDraft) and found.meta == kept


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (turns,) = read(tmp_path, [llava("<image>", "b", image="a.jpg")], images=None)
    assert turns[0] == ("user", [LocalFile(str(tmp_path), "a.jpg")])


def draft(*contents: Any) -> ConversationDraft:
    return ConversationDraft("k", [("user", list(contents)), ("assistant", ["b"])], "mine", {"id": 1})


def test_finished_conversations() -> None:
    one = draft(file("a.jpg"), "a", file("b.jpg"))
    assert one.sources() == [file("a.jpg"), file("b.jpg")]
    wanted = ConversationRecord("k", [("user", [b"1", "a", b"2"]), ("assistant", ["b"])], "mine", {"id": 1})
    assert one.finish([b"1", b"2"]) == wanted
    assert one.finish([b"1", Lost("corrupt_image")]) == Dropped("corrupt_image")
    assert draft("\ud83d").finish([]) == Dropped("bad_unicode")
