"""tools/data/from_conversations.py, and what the other tools make of its shards."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from examples.tiny.make_data import make_data
from megatron_atum.data.shards import read_shard
from tests.data.converters.files import decoded, jpeg, write_jsonl
from tests.tools.calls import call
from tools.data import from_conversations, index, stats, validate

QUIET = ("--quiet", "--workers", "0", "--threads", "2")
Capture = pytest.CaptureFixture[str]
ASK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A picture."}]
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Two good conversations with an image, two without one, and two bad ones."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(jpeg(1, 900, 600))
    rows = [{"id": n, "image": "a.jpg", "conversations": ASK} for n in range(2)]
    rows += [{"messages": TALK}] * 2 + [{"image": "gone.jpg", "conversations": ASK}, {"conversations": ASK}]
    write_jsonl(tmp_path / "in" / "chats.jsonl", rows)
    return tmp_path


def convert(mine: Path, capsys: Capture, *more: object) -> Path:
    paths = ("--input", mine / "in", "--images", mine / "photos", "--out", mine / "out", "--source", "mine")
    done = call(from_conversations.main, capsys, *paths, *QUIET, *more)
    assert done.code == 0 and "kept 4" in done.out, done.err
    return mine / "out"


def test_shards_and_counts(mine: Path, capsys: Capture) -> None:
    out = convert(mine, capsys, "--max-side", "300")
    samples = list(read_shard(out / "chats-00000.tar"))
    assert [key for key, _ in samples] == [f"chats-{n:07d}" for n in range(4)]
    record = json.loads(samples[0][1]["json"])
    content = [{"image": "000.jpg"}, "What is it?"]
    assert record == {
        "version": 1,
        "source": "mine",
        "turns": [{"role": "user", "content": content}, {"role": "assistant", "content": ["A picture."]}],
        "meta": {"id": 0},
    }
    assert decoded(samples[0][1]["000.jpg"]).size == (300, 200) and list(samples[2][1]) == ["json"]
    summary = json.loads((out / "conversion.json").read_text())
    assert summary["samples"]["dropped"] == {"image_count_mismatch": 1, "no_such_file": 1}
    assert summary["images"] == {"read": 3, "kept": 2, "lost": {"no_such_file": 1}}
    before = (out / "chats-00000.tar").stat().st_mtime_ns
    convert(mine, capsys, "--max-side", "300")
    assert (out / "chats-00000.tar").stat().st_mtime_ns == before, "made a second time"


def test_what_is_written_is_no_input(mine: Path, capsys: Capture) -> None:
    """The output has files of the suffixes that are read."""
    (mine / "in" / "more.json").write_text(json.dumps([{"messages": TALK}]))
    out = mine / "in" / "shards"
    options = ("--input", mine / "in", "--images", mine / "photos", "--out", out, *QUIET)
    done = call(from_conversations.main, capsys, *options)
    assert done.code == 0 and "2 parts converted" in done.out and "kept 5" in done.out, done.err
    (out / "manifest.json").write_text("[]")  # as of tools/data/index.py
    before = contents(out)
    done = call(from_conversations.main, capsys, *options)
    assert done.code == 0 and "2 parts converted" in done.out and contents(out) == before, done.err
    done = call(from_conversations.main, capsys, "--input", out, "--out", out, *QUIET)
    assert done.code == 2 and f"lies in --out {out}, from which nothing is read" in done.err


def test_images_of_another_folder_are_not_mixed_in(
    mine: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(mine, capsys)
    monkeypatch.chdir(mine)
    convert(mine, capsys, "--images", "in/../photos")  # the same one
    (mine / "other").mkdir()
    options = ("--input", mine / "in", "--out", mine / "out", "--source", "mine", *QUIET)
    for more in (("--images", mine / "other"), ()):
        done = call(from_conversations.main, capsys, *options, *more)
        assert done.code == 2 and f"images '{mine}/photos' (now " in done.err


@pytest.mark.parametrize("content", ['{\n  "messages":\n  [\n  ]\n}\n', "[1, 2]", "<html>\n</html>"])
def test_a_file_of_another_form_is_no_empty_result(tmp_path: Path, capsys: Capture, content: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    done = call(from_conversations.main, capsys, "--input", tmp_path / "mine.json", "--out", tmp_path / "out", *QUIET)
    assert done.code == 2 and "mine.json: none of its" in done.err and "one JSON object a line" in done.err
    assert "0 parts converted, 0 skipped, 1 failed" in done.out


def test_turns_that_do_not_fit_are_shown(mine: Path, capsys: Capture) -> None:
    talk = [{"role": role, "content": "word " * 6} for role in ("user", "assistant")] * 3
    write_jsonl(mine / "in" / "chats.jsonl", [{"messages": talk}] * 4)
    out = convert(mine, capsys)
    make_data(mine / "tiny")
    tokenizer = mine / "tiny" / "tokenizer.model"
    call(index.main, capsys, out, "--kind", "conversations", "--tokenizer", tokenizer, "--workers", "0", "--quiet")
    source = f"[{{name: mine, shards: {out}/manifest.json, kind: conversations}}]"
    (mine / "run.yaml").write_text(f"{{model: {{preset: tiny}}, data: {{tokenizer: {tokenizer}, sources: {source}}}}}")
    options = ("model.additional_vocab_size=3", "data.sequence_length=128", "--packs", "2500")
    done = call(stats.main, capsys, "--config", mine / "run.yaml", *options)
    assert done.code == 0 and re.search("mine: shortened [0-9,]+: their last turns do not fit a row", done.out), done
    assert "no row of this length holds them" not in done.out


def test_index_validate_and_stats(mine: Path, capsys: Capture) -> None:
    out = convert(mine, capsys)
    make_data(mine / "tiny")
    tokenizer = mine / "tiny" / "tokenizer.model"
    options = ("--tokenizer", tokenizer, "--workers", "0", "--quiet")
    done = call(index.main, capsys, out, "--kind", "conversations", *options)
    assert done.code == 0 and "4 samples, 4 of them usable with all filters" in done.out.replace("\n", " "), done.out
    done = call(validate.main, capsys, out / "manifest.json", "--images", *options)
    assert (done.code, done.out) == (0, "no fault\n")
    source = f"[{{name: mine, shards: {out}/manifest.json, kind: conversations}}]"
    (mine / "run.yaml").write_text(f"{{model: {{preset: tiny}}, data: {{tokenizer: {tokenizer}, sources: {source}}}}}")
    run = ("--config", mine / "run.yaml", "data.sequence_length=64")
    done = call(stats.main, capsys, *run)
    assert done.code == 2 and "model.additional_vocab_size=3 would work" in done.err
    done = call(stats.main, capsys, *run, "model.additional_vocab_size=3", "--packs", "50")
    assert done.code == 0 and "mine" in done.out and "conversations" in done.out, done.err
    done = call(stats.main, capsys, *run, "model.additional_vocab_size=3", "data.sequence_length=16", "--packs", "5")
    assert done.code == 2 and "no sample fits into a row of 16 tokens" in done.err


def test_changed_texts_are_found(mine: Path, capsys: Capture) -> None:
    """validate.py --tokenizer looks at turns as well: the same ids may belong to another side."""
    from megatron_atum.data.sidecar import Sidecar, read_sidecar, sidecar_path
    from megatron_atum.data.storage import Storage
    from megatron_atum.data.validating import _same_ids

    out = convert(mine, capsys)
    make_data(mine / "tiny")
    options = ("--tokenizer", mine / "tiny" / "tokenizer.model", "--workers", "0", "--quiet")
    call(index.main, capsys, out, "--kind", "conversations", *options)
    stored = read_sidecar(sidecar_path(str(out / "chats-00000.tar")), Storage())
    assert _same_ids(stored, 0, stored, 0)
    asked = int(stored.arrays["first_turn"][0])  # the turn of the user, whose end no answer shows
    for name, places in (("answer_start", slice(None)), ("turn_end", slice(asked, asked + 1))):
        changed = stored.arrays[name].copy()
        changed[places] -= 1
        other = Sidecar(stored.info, stored.arrays | {name: changed})
        assert not _same_ids(stored, 0, other, 0), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "none"], "input none does not exist"),
        (["--input", "a.txt"], "is no file of the kind .jsonl, .jsonl.gz"),
        (["--input", "a.json", "--images", "none"], "--images none is no folder"),
        (["--input", "a.json", "--store", "none"], "image store none is no folder"),
    ],
)
def test_bad_options(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("a.txt", "a.json"):
        (tmp_path / name).write_text("[]")
    monkeypatch.chdir(tmp_path)
    done = call(from_conversations.main, capsys, "--out", "out", *QUIET, *options)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err


def test_help_has_examples(capsys: Capture) -> None:
    done = call(from_conversations.main, capsys, "--help")
    assert done.code == 0 and "python tools/data/from_conversations.py --input" in done.out and "--max-side" in done.out
