"""The driver: shards, counts, restarts and kills."""

from __future__ import annotations

import json
import multiprocessing.forkserver
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset

from megatron_atum.data.converters import convert as driver
from megatron_atum.data.converters.convert import AHEAD, Conversion, convert
from megatron_atum.data.converters.counts import Counts
from megatron_atum.data.converters.fetch import FetchSpec
from megatron_atum.data.converters.obelics import Obelics
from megatron_atum.data.converters.reach import Reach
from megatron_atum.data.converters.reencode import ImageLimits
from megatron_atum.data.text import Image, parse_sample
from megatron_atum.errors import DataError
from tests.data.converters.fetchers import Counting
from tests.data.converters.files import Row, obelics_row, write_parquet
from tests.distributed import _server

Change = Callable[[Path], Any]
FETCHERS = "tests.data.converters.fetchers"
DOCUMENTS = 14
PARTS = 3
# Of each part: document 3 loses both images, 5 has unequal lengths, 7 has no image; document 4 loses one of two.
KEPT, LOST = DOCUMENTS - 3, 3


def rows(part: int) -> list[Row]:
    made = []
    for i in range(DOCUMENTS):
        word = "lost" if i == 3 else "here"
        other = "lost" if i in (3, 4) else "here"
        urls = [None, f"http://{word}.example/{part}/{i}", None, f"http://{other}.example/{part}/{i}/b"]
        made.append(obelics_row([f"text {i}", None, "more <s>", None], urls))
    made[5]["texts"] = made[5]["texts"][:-1]
    made[7] = obelics_row(["only text"], [None])
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in range(PARTS):
        write_parquet(tmp_path / "in" / f"train-0000{part}.parquet", rows(part), "obelics")
    return tmp_path


def made(folder: Path, out: str = "out", fetcher: str = "Made", **options: str) -> Conversion:
    fetch = FetchSpec(f"{FETCHERS}:{fetcher}", options=options)
    return Conversion(Obelics(), str(folder / out), fetch=fetch, samples_per_shard=4, threads=4)


def start(conversion: Conversion, folder: Path, workers: int = 0) -> Counts:
    _server()  # so that workers need not import torch each
    return convert(conversion, [str(folder / "in")], workers, quiet=True)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def stop_when(conversion: Conversion, folder: Path, pattern: str, number: signal.Signals = signal.SIGKILL) -> int:
    """Runs a conversion with two workers in a process and kills that as soon as such a file appears."""
    context = _server()
    process = context.Process(target=convert_until_stopped, args=(conversion, folder))
    process.start()
    out, deadline = Path(conversion.out), time.monotonic() + 30
    while not (out.is_dir() and any(re.search(pattern, name) for name in os.listdir(out))):
        assert time.monotonic() < deadline and process.is_alive(), "nothing to kill"
        time.sleep(0.001)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def test_shards_are_plain_webdataset_and_parse(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = start(made(folder), folder)
    shards = sorted(str(path) for path in (folder / "out").glob("*.tar"))
    assert [Path(shard).name for shard in shards[:4]] == [
        *(f"train-00000-0000{n}.tar" for n in range(3)),
        "train-00001-00000.tar",
    ]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == PARTS * KEPT == counts.kept
    assert [sample["__key__"] for sample in samples[:4]] == [f"train-00000-000000{n}" for n in (0, 1, 2, 4)]
    whole, lossy = samples[0], samples[3]
    parsed = parse_sample(whole["json"], "documents")
    assert parsed.documents == [["text 0", Image("000.jpg"), "more <s>", Image("001.jpg")]]
    assert whole["000.jpg"][:2] == b"\xff\xd8"
    record = json.loads(lossy["json"])
    assert record["images"] == [None, "000.jpg", None, ""] and record["missing"] == {"3": "http_404"}
    assert record["meta"]["image_urls"]["1"] == "http://here.example/0/4"
    assert parse_sample(lossy["json"], "documents").lost_images == 1

    printed = capsys.readouterr().out
    assert "3 parts converted, 0 skipped, 0 failed" in printed
    assert re.search(r"samples +read 42 +kept 33 +dropped 9", printed)
    assert re.search(r"all_images_lost +3\n", printed) and re.search(r"http_404 +9\n", printed)


def test_counts_add_up_and_are_written(folder: Path) -> None:
    start(made(folder), folder)
    part = json.loads((folder / "out" / "train-00001.counts.json").read_text())
    assert part["samples"] == {
        "read": DOCUMENTS,
        "kept": KEPT,
        "dropped": {"all_images_lost": 1, "no_image": 1, "unequal_lengths": 1},
    }
    assert part["images"] == {"read": 2 * 12, "kept": 2 * 12 - LOST, "lost": {"http_404": LOST}}
    assert part["input"]["name"] == "train-00001.parquet" and part["options"]["max-side"] == 512
    assert [shard["samples"] for shard in part["shards"]] == [4, 4, 3]
    total = json.loads((folder / "out" / "conversion.json").read_text())
    assert total["complete"] and total["parts"] == PARTS and total["failed"] == {}
    assert total["samples"]["read"] == PARTS * DOCUMENTS and total["images"]["kept"] == PARTS * (24 - LOST)


def test_images_of_a_dropped_document_are_counted(folder: Path) -> None:
    write_parquet(folder / "in" / "x.parquet", [obelics_row(["a", None], [None, "http://a.example/1"])], "obelics")
    path = folder / "in" / "y.jsonl"
    path.write_text(json.dumps(obelics_row(["\ud800", None], [None, "http://a.example/1"])) + "\n")
    counts = start(made(folder), folder)
    assert counts.dropped["bad_unicode"] == 1 and counts.images_lost["in_dropped_sample"] == 1


def test_a_shard_ends_at_its_bytes(folder: Path) -> None:
    start(replace(made(folder), shard_bytes=2500), folder)
    part = json.loads((folder / "out" / "train-00000.counts.json").read_text())
    assert len(part["shards"]) > 4 and sum(shard["samples"] for shard in part["shards"]) == KEPT


def test_threads_processes_and_slow_answers_do_not_change_a_byte(folder: Path) -> None:
    start(made(folder, "one"), folder, workers=0)
    start(replace(made(folder, "two", delay="0.02"), threads=7), folder, workers=2)
    assert contents(folder / "one") == contents(folder / "two")


def test_images_are_fetched_ahead_but_not_without_bound(folder: Path) -> None:
    many = [obelics_row(["a", None], [None, f"http://a.example/{i}"]) for i in range(400)]
    path = write_parquet(folder / "many" / "a.parquet", many, "obelics")
    conversion, counts = made(folder, fetcher="Counting"), Counts()
    Counting.asked = 0
    part = driver.find_parts([str(path)], (".parquet",))[0]
    records = driver._records(conversion, part, Counting(), counts, Reach(), lambda counts: None)
    next(records)
    time.sleep(0.2)
    assert 2 < Counting.asked <= AHEAD * conversion.threads
    records.close()


def test_a_restart_does_nothing_when_all_is_done(folder: Path) -> None:
    start(made(folder), folder)
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("train*")}
    assert start(made(folder, fetcher="Made"), folder).kept == PARTS * KEPT
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("train*")} == times


def remove_counts(out: Path) -> None:
    (out / "train-00001.counts.json").unlink()


def remove_shard(out: Path) -> None:
    (out / "train-00001-00001.tar").unlink()


def cut_shard(out: Path) -> None:
    os.truncate(out / "train-00001-00001.tar", 1000)


def leave_litter(out: Path) -> None:
    remove_counts(out)
    for name in ("train-00001-00000.tar.77.tmp", "train-00001-00009.tar", "train-00001.counts.json.5.tmp"):
        (out / name).write_bytes(b"half")


@pytest.mark.parametrize("change", [remove_counts, remove_shard, cut_shard, leave_litter])
def test_an_unfinished_part_is_made_anew_and_only_that(folder: Path, change: Change) -> None:
    out = folder / "out"
    start(made(folder), folder)
    whole = contents(out)
    before = (out / "train-00002-00000.tar").stat().st_mtime_ns
    change(out)
    start(made(folder), folder)
    assert contents(out) == whole
    assert (out / "train-00002-00000.tar").stat().st_mtime_ns == before


def test_parts_that_come_later_are_added(folder: Path) -> None:
    convert(made(folder), [str(folder / "in" / "train-00000.parquet")], 0, quiet=True)
    counts = convert(made(folder), [str(folder / "in" / "train-0000[12].parquet")], 0, quiet=True)
    assert counts.kept == PARTS * KEPT
    start(made(folder, "other"), folder)
    assert contents(folder / "out") == contents(folder / "other")


def test_kill_9_after_kill_9_a_restart_gives_the_same_bytes(folder: Path) -> None:
    start(made(folder, "whole"), folder)
    slow = made(folder, delay="0.04")
    for pattern in (r"\.tar\.\d+\.tmp$", r"0000[01]-00001\.tar$", r"counts\.json$"):
        assert stop_when(slow, folder, pattern) == -signal.SIGKILL
        assert len(contents(folder / "out")) < len(contents(folder / "whole"))
    assert not json.loads((folder / "out" / "conversion.json").read_text())["complete"]
    wait_until(lambda: rests(folder / "out"))
    assert len(contents(folder / "out")) < len(contents(folder / "whole")), "the workers went on without their parent"
    start(made(folder), folder)
    assert contents(folder / "out") == contents(folder / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent_whatever_they_wait_for(folder: Path, number: int, code: int) -> None:
    sign = folder / "sign"
    conversion = made(folder, fetcher="Waiting", sign=str(sign))
    process = _server().Process(target=convert_until_stopped, args=(conversion, folder))
    process.start()
    wait_until(sign.exists)
    worker = int(sign.read_text())
    assert process.pid is not None and worker != process.pid
    os.kill(process.pid, number)
    process.join(10)
    assert process.exitcode == code
    wait_until(lambda: not alive(worker))


def rests(out: Path) -> bool:
    before = sorted(os.listdir(out))
    time.sleep(0.3)
    return sorted(os.listdir(out)) == before


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def convert_until_stopped(conversion: Conversion, folder: Path) -> None:
    """With two workers, which come from the server of the session: Python 3.11 would start another, empty one."""
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    convert(conversion, [str(folder / "in")], 2, quiet=True)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_other_settings_are_refused_and_named(folder: Path) -> None:
    start(made(folder), folder)
    other = replace(made(folder), limits=ImageLimits(max_side=256), samples_per_shard=5)
    with pytest.raises(DataError, match=r"max-side 512 \(now 256\), samples-per-shard 4 \(now 5\)"):
        start(other, folder)
    for path in (folder / "out").glob("train*"):
        path.unlink()
    with pytest.raises(DataError, match=r"max-side 512 \(now 256\)"):
        start(other, folder)
    (folder / "out" / "conversion.json").unlink()
    (folder / "out" / "mine").touch()
    with pytest.raises(DataError, match="is not empty"):
        start(made(folder), folder)


def test_an_input_that_changed_is_refused_and_named(folder: Path) -> None:
    start(made(folder), folder)
    write_parquet(folder / "in" / "train-00001.parquet", rows(1)[:-1], "obelics")
    with pytest.raises(DataError, match=r"in/train-00001\.parquet changed \(bytes, ends_sha256\) since"):
        start(made(folder), folder)


def test_an_input_that_changed_at_the_same_size_is_refused(folder: Path) -> None:
    start(made(folder), folder)
    path = folder / "in" / "train-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 0", b"TEXT 0"))
    assert path.read_bytes() != content
    with pytest.raises(DataError, match=r"in/train-00001\.parquet changed \(ends_sha256\) since"):
        start(made(folder), folder)


def test_an_input_folder_that_was_copied_is_known_again(folder: Path) -> None:
    start(made(folder), folder)
    times = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("train*")}
    (folder / "in").rename(folder / "old")
    for path in (folder / "old").iterdir():
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / path.name).write_bytes(path.read_bytes())
    start(made(folder), folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").glob("train*")} == times


def test_a_folder_of_another_version_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "VERSION", driver.VERSION - 1)
    start(made(folder), folder)
    monkeypatch.undo()
    with pytest.raises(DataError, match="made by another version"):
        start(made(folder), folder)


REASONS = "dns connection timeout http_408 http_429 http_500 http_503"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_outage_fails_the_part_and_the_next_call_makes_it_anew(folder: Path, workers: int) -> None:
    switch = folder / "offline"
    conversion = made(folder, fetcher="Offline", switch=str(switch), reasons=REASONS)
    convert(conversion, [str(folder / "in" / "train-00002.parquet")], 0, quiet=True)
    done = contents(folder / "out")
    switch.touch()
    message = r"2 of 3 parts .*train-00000\.parquet: 21 of 24 images could not be reached \(.*\d.*check the network"
    with pytest.raises(DataError, match=message):
        start(conversion, folder, workers)
    found = contents(folder / "out")
    summary = json.loads(found.pop("conversion.json"))
    del done["conversion.json"]
    assert found == done and not summary["complete"] and sorted(summary["failed"]) == ["train-00000", "train-00001"]
    switch.unlink()
    start(conversion, folder, workers)
    start(replace(conversion, out=str(folder / "whole")), folder)
    assert contents(folder / "out") == contents(folder / "whole")


def test_an_outage_may_be_allowed_later(folder: Path) -> None:
    switch = folder / "offline"
    switch.touch()
    conversion = made(folder, fetcher="Offline", switch=str(switch), reasons=REASONS)
    with pytest.raises(DataError, match="3 of 3 parts"):
        start(conversion, folder)
    assert start(replace(conversion, max_unreachable=0.9), folder).kept == 0


def test_lost_images_and_few_images_are_no_outage(folder: Path) -> None:
    switch = folder / "offline"
    switch.touch()
    gone = made(folder, "gone", fetcher="Offline", switch=str(switch), reasons="http_404 http_403 tls http_501x")
    assert start(gone, folder).kept == 0
    few = [obelics_row(["a", None], [None, f"http://here.example/{i}"]) for i in range(19)]
    write_parquet(folder / "few" / "a.parquet", few, "obelics")
    conversion = made(folder, fetcher="Offline", switch=str(switch), reasons="dns")
    assert convert(conversion, [str(folder / "few")], 0, quiet=True).images_lost == {"dns": 19}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_that_cannot_be_read_fails_after_the_others_are_done(folder: Path, workers: int) -> None:
    broken = folder / "in" / "train-00000.parquet"
    good = broken.read_bytes()
    broken.write_bytes(good[:-100])
    with pytest.raises(DataError, match=r"1 of 3 parts .*in/train-00000\.parquet cannot be read"):
        start(made(folder), folder, workers)
    summary = json.loads((folder / "out" / "conversion.json").read_text())
    assert not summary["complete"] and list(summary["failed"]) == ["train-00000"] and summary["parts"] == 2
    broken.write_bytes(good)
    start(made(folder), folder, workers)
    start(made(folder, "whole"), folder)
    assert contents(folder / "out") == contents(folder / "whole")


def test_a_part_that_fails_in_its_middle_leaves_no_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Obelics.read

    def read(self: Obelics, part: Any) -> Any:
        yield from list(real(self, part))[:9]
        raise DataError("ends here")

    monkeypatch.setattr(Obelics, "read", read)
    monkeypatch.setattr(driver, "AHEAD", 1)
    with pytest.raises(DataError, match="3 of 3 parts"):
        start(made(folder), folder)
    assert [path.name for path in (folder / "out").iterdir()] == ["conversion.json"]


def test_a_worker_that_dies_is_noticed(folder: Path) -> None:
    with pytest.raises(DataError, match=r"a worker died at .*train-0000\d\.parquet \(exit code 7\)"):
        start(made(folder, fetcher="Dying"), folder, workers=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_of_a_fetcher_ends_everything(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'a bug'"):
        start(made(folder, fetcher="Buggy"), folder, workers)
    assert "fetchers.py" in capsys.readouterr().err


def test_a_full_disk_ends_everything_and_a_restart_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = driver.write_shard

    def write_shard(path: str, records: Any) -> int:
        if path.endswith("train-00001-00001.tar"):
            raise OSError(28, "No space left on device", path)
        return real(path, records)

    monkeypatch.setattr(driver, "write_shard", write_shard)
    with pytest.raises(OSError, match="No space left"):
        start(made(folder), folder)
    monkeypatch.undo()
    start(made(folder), folder)
    start(made(folder, "whole"), folder)
    assert contents(folder / "out") == contents(folder / "whole")


def test_two_conversions_into_one_folder_are_refused(folder: Path) -> None:
    with driver._locked(str(folder / "out")), pytest.raises(DataError, match="another conversion"):
        start(made(folder), folder)
    start(made(folder), folder)


def test_out_is_a_file(folder: Path) -> None:
    (folder / "out").write_bytes(b"")
    with pytest.raises(DataError, match=r"--out .* is a file"):
        start(made(folder), folder)
