"""tools/data/from_*.py: from real files to shards, and what they say about bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from megatron_atum.data.shards import read_shard
from megatron_atum.data.text import parse_sample
from tests.data.converters.files import (
    decoded,
    encoded,
    jpeg,
    laion_members,
    obelics_row,
    picture,
    write_arrow,
    write_jsonl,
    write_parquet,
    write_store,
    write_tar,
)
from tests.tools.calls import call
from tools.data import from_documents, from_img2dataset, from_obelics, from_pmd

ROOT = Path(__file__).parents[2]
QUIET = ("--quiet", "--workers", "0", "--threads", "2")
TOOLS = [from_documents, from_img2dataset, from_obelics, from_pmd]
URL = "http://a.example/{}.jpg"
Capture = pytest.CaptureFixture[str]


def shards(out: Path, kind: str) -> dict[str, dict[str, bytes]]:
    """Samples by key; each is read by plain webdataset too, and its text is understood by the loader."""
    paths = sorted(str(path) for path in out.glob("*.tar"))
    samples = {key: members for path in paths for key, members in read_shard(path)}
    assert [sample["__key__"] for sample in webdataset.WebDataset(paths, shardshuffle=False)] == list(samples)
    for members in samples.values():
        parse_sample(members["json" if kind == "documents" else "txt"], kind)
    return samples


def summary(out: Path) -> dict[str, dict[str, int | dict[str, int]]]:
    value: dict[str, dict[str, int | dict[str, int]]] = json.loads((out / "conversion.json").read_text())
    return value


def test_obelics_from_a_store(tmp_path: Path, capsys: Capture) -> None:
    store = write_store(tmp_path / "store", {URL.format(1): jpeg(1, 900, 600), URL.format(2): b"<html>"})
    row = obelics_row(["one", None, None, None], [None, URL.format(1), URL.format(2), URL.format(3)])
    write_parquet(tmp_path / "in" / "train-00000.parquet", [row], "obelics")
    options = ("--input", tmp_path / "in", "--out", tmp_path / "out", "--store", store, "--max-side", "300")
    done = call(from_obelics.main, capsys, *options, *QUIET)
    assert done.code == 0 and "kept 1" in done.out and done.err == ""
    ((key, members),) = shards(tmp_path / "out", "documents").items()
    assert key == "train-00000-0000000" and list(members) == ["json", "000.jpg"]
    record = json.loads(members["json"])
    assert record["images"] == [None, "000.jpg", "", ""] and record["source"] == "obelics"
    assert record["missing"] == {"2": "not_an_image", "3": "not_in_store"}
    assert decoded(members["000.jpg"]).size == (300, 200)


def test_an_outage_is_not_written_down_as_lost_images(tmp_path: Path, capsys: Capture) -> None:
    rows = [obelics_row(["one", None], [None, f"http://127.0.0.1:9/{number}.jpg"]) for number in range(20)]
    write_parquet(tmp_path / "in" / "train-00000.parquet", rows, "obelics")
    http = ("--fetcher", "http", "--retries", "0", "--allow-private")
    options = ("--input", tmp_path / "in", "--out", tmp_path / "out", *http, *QUIET)
    done = call(from_obelics.main, capsys, *options)
    assert done.code == 2 and "20 of 20 images could not be reached (connection 20); check the network" in done.err
    assert not summary(tmp_path / "out")["complete"] and summary(tmp_path / "out")["parts"] == 0
    done = call(from_obelics.main, capsys, *options, "--max-unreachable", "1")
    assert done.code == 0 and summary(tmp_path / "out")["images"]["lost"] == {"connection": 20}


def test_img2dataset(tmp_path: Path, capsys: Capture) -> None:
    write_tar(tmp_path / "in" / "00000.tar", laion_members("000000000"), {"count": 2, "successes": 1})
    write_tar(tmp_path / "in" / "00003.tar", laion_members("000030000", 1), {"count": 1, "successes": 1})
    write_tar(tmp_path / "in" / "00004.tar", laion_members("000040000", 2))
    (tmp_path / "in" / "00000.parquet").write_bytes(b"not read")
    options = ("--input", tmp_path / "in", "--out", tmp_path / "out", *QUIET)
    done = call(from_img2dataset.main, capsys, *options)
    assert done.code == 0 and "2 parts converted, 1 skipped" in done.out and "no 00004_stats.json" in done.out
    samples = shards(tmp_path / "out", "pairs")
    assert list(samples) == ["000000000", "000030000"]
    assert samples["000030000"]["jpg"] == jpeg(1), "encoded a second time"
    assert json.loads(samples["000030000"]["json"])["url"] == "http://x.example/000030000.jpg"
    assert not summary(tmp_path / "out")["complete"]
    assert summary(tmp_path / "out")["samples"]["dropped"] == {"img2dataset_failed": 1}

    done = call(from_img2dataset.main, capsys, *options, "--incomplete", "use")
    assert done.code == 0 and "3 parts converted, 0 skipped" in done.out
    assert len(shards(tmp_path / "out", "pairs")) == 3 and summary(tmp_path / "out")["complete"]


def test_pmd_from_parquet_and_arrow(tmp_path: Path, capsys: Capture) -> None:
    image = {"bytes": encoded(picture(), "PNG"), "path": None}
    rows = [{"image": image, "text": "a cat", "source": "coco"}, {"image": image, "text": "no", "source": "sbu"}]
    write_parquet(tmp_path / "in" / "coco" / "train-0.parquet", rows, "pmd")
    url_only = [{"image": None, "image_url": URL.format(1), "text": "a dog", "source": "red_caps"}]
    write_arrow(tmp_path / "in" / "red_caps" / "data-00000-of-00001.arrow", url_only, "pmd")
    (tmp_path / "in" / "red_caps" / "state.json").write_text("{}")
    options = ("--input", tmp_path / "in", "--exclude", "sbu", *QUIET)
    assert call(from_pmd.main, capsys, *options, "--out", tmp_path / "out").code == 0
    samples = shards(tmp_path / "out", "pairs")
    assert {key: members["txt"] for key, members in samples.items()} == {"coco-train-0-0000000": b"a cat"}
    assert json.loads(samples["coco-train-0-0000000"]["json"]) == {"source": "coco"}
    assert summary(tmp_path / "out")["samples"]["dropped"] == {"excluded_source": 1, "no_image": 1}

    index = write_jsonl(tmp_path / "index.jsonl", [{"url": URL.format(1), "path": "x/1.bin"}])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.bin").write_bytes(jpeg())
    stored = ("--store", tmp_path, "--store-index", index, "--out", tmp_path / "other")
    assert call(from_pmd.main, capsys, *options, *stored).code == 0
    assert len(shards(tmp_path / "other", "pairs")) == 2


def write_wiki(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.jpg").write_bytes(jpeg())
    rows = [
        {"texts": ["A cat.", None], "images": [None, "photos/cat.jpg"], "id": "Cat"},
        {"parts": [{"image": "photos/cat.jpg"}, {"image": "../secret.jpg"}, {"text": "Words."}]},
        {"parts": [{"text": "Only words."}]},
        "{broken",
    ]
    return write_jsonl(folder / "wiki.jsonl", rows)


def test_documents(tmp_path: Path, capsys: Capture) -> None:
    wiki = write_wiki(tmp_path / "in")
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    options = ("--input", wiki, "--source", "wikipedia", *QUIET)
    assert call(from_documents.main, capsys, *options, "--out", tmp_path / "out").code == 0
    records = [json.loads(members["json"]) for members in shards(tmp_path / "out", "documents").values()]
    assert [record["meta"] for record in records] == [{"id": "Cat"}, {}]
    assert records[1]["missing"] == {"1": "path_outside"} and records[1]["source"] == "wikipedia"
    assert summary(tmp_path / "out")["samples"]["dropped"] == {"bad_json": 1, "no_image": 1}

    more = ("--out", tmp_path / "more", "--no-require-image", "--images", tmp_path / "in")
    assert call(from_documents.main, capsys, *options, *more).code == 0
    assert len(shards(tmp_path / "more", "documents")) == 3


def test_the_command_line_with_processes(tmp_path: Path) -> None:
    """Workers import the tool anew, and a bar is drawn."""
    write_wiki(tmp_path / "in")
    (tmp_path / "in" / "broken.jsonl.gz").write_bytes(b"\x1f\x8bbroken")
    command = [sys.executable, str(ROOT / "tools" / "data" / "from_documents.py"), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--input", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command + options, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "2/2" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("from_documents: 1 of 2 parts could not be converted")
    assert "broken.jsonl.gz cannot be read" in done.stderr and "1 parts converted, 0 skipped, 1 failed" in done.stdout
    assert len(shards(tmp_path / "out", "documents")) == 2


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_help_has_examples(tool: object, capsys: Capture) -> None:
    done = call(tool.main, capsys, "--help")  # type: ignore[attr-defined]
    name = tool.__name__.rsplit(".", 1)[1]  # type: ignore[attr-defined]
    assert done.code == 0 and f"python tools/data/{name}.py --input" in done.out and "--max-side" in done.out


@pytest.mark.parametrize(
    ("main", "options", "message"),
    [
        (from_obelics.main, ["--input", "none"], "give --fetcher http, or --store FOLDER"),
        (from_obelics.main, ["--input", "none", "--fetcher", "http"], "input none does not exist"),
        (from_obelics.main, ["--input", "none", "--fetcher", "no.module:x"], "cannot be imported"),
        (from_obelics.main, ["--input", "none", "--fetcher", "http", "--store", "."], "choose one"),
        (from_obelics.main, ["--input", "none", "--store", "none"], "image store none is no folder"),
        (from_pmd.main, ["--input", "none", "--store-index", "a.jsonl"], "needs --store"),
        (from_pmd.main, ["--input", "*.parquet"], "holds no file of the kind .parquet"),
        (from_pmd.main, ["--input", "none", "--fetcher", "a:b", "--fetcher-option", "x"], "is not NAME=VALUE"),
        (from_pmd.main, ["--input", "none", "--max-unreachable", "2"], "'2' is not a share from 0 to 1"),
        (from_documents.main, ["--input", "none", "--images", "none"], "--images none is no folder"),
        (from_img2dataset.main, ["--input", "text.txt"], "input text.txt is no file of the kind .tar"),
        (from_img2dataset.main, ["--input", "1.tar"], "no 1_stats.json"),
        (from_img2dataset.main, ["--input", "1.tar", "--max-side", "0"], "'0' is not a whole number from 1"),
        (from_img2dataset.main, ["--input", "1.tar", "--shard-bytes", "much"], "'much' is not a size"),
        (from_img2dataset.main, ["--input", "1.tar", "--out", "text.txt"], "--out text.txt is a file"),
        (from_img2dataset.main, ["--input", "1.tar", "--out", "."], "input 1.tar lies in --out ."),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(
    main: Callable[[], None],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (tmp_path / "text.txt").write_text("x")
    write_tar(tmp_path / "1.tar", laion_members("1"))
    monkeypatch.chdir(tmp_path)
    done = call(main, capsys, "--out", "out", *QUIET, *options)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
