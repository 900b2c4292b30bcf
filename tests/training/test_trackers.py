"""TensorBoard and W&B get what metrics.jsonl gets, and nothing that happens to them reaches the run."""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError
from megatron_atum.training import trackers
from megatron_atum.training.trackers import check_trackers, open_trackers

# TensorBoard's own thread ends with the exception that it has handed on; pytest may see it in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def config_of(**logging: Any) -> Config:
    config = Config()
    config.logging.run = "somewhere"
    for key, value in logging.items():
        setattr(config.logging, key, value)
    return config


def line(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "loss/pairs": loss / 2, "faults": 0, "slowest_host": "node-1"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in accumulator.Scalars(name)] for name in names}


def wandb_records(folder: Path) -> list[list[Any]]:
    """The records of each offline run, in the order in which they were started."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # waits for W&B's process, which writes the end of a file after finish() has returned
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    return [[Record.FromString(data) for data in leveldb_records(path.read_bytes())] for path in paths]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """A leveldb log: blocks of 32 KiB (the first begins with W&B's 7 bytes) of pieces with 7 bytes of header each."""
    at, record = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # too short for a piece
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def history(records: list[Any]) -> list[dict[str, Any]]:
    lines = []
    for record in records:
        if record.HasField("history"):
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines


# What they get -------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_values_of_steps_and_validation(tmp_path: Path) -> None:
    opened = open_trackers(config_of(tensorboard=True), tmp_path, writes=True)
    opened.event("start", 0, {})
    for step in (1, 2, 3):
        opened.step(line(step, 1 / step))
    opened.event("validation", 3, {"loss": 0.25, "perplexity/pairs": 2.5})
    opened.event("save_failed", 3, {"error": "no space"})
    opened.close()
    found = scalars(tmp_path)
    assert set(found) == {"loss", "loss/pairs", "faults", "validation/loss", "validation/perplexity/pairs"}
    assert found["loss"] == [(step, pytest.approx(1 / step)) for step in (1, 2, 3)]
    assert found["validation/perplexity/pairs"] == [(3, 2.5)]


def test_tensorboard_hides_what_a_resume_and_a_rollback_undo(tmp_path: Path) -> None:
    first = open_trackers(config_of(tensorboard=True), tmp_path, writes=True)
    first.event("start", 0, {})
    for step in range(1, 7):
        first.step(line(step, 1.0))
    first.close()
    second = open_trackers(config_of(tensorboard=True), tmp_path, writes=True)
    second.event("resume", 4, {})
    for step in (5, 6, 7):
        second.step(line(step, 2.0))
    second.event("rollback", 5, {"from": 7})
    for step in (6, 7, 8):
        second.step(line(step, 3.0))
    second.close()
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 3.0), (7, 3.0), (8, 3.0)]


def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path) -> None:
    for name, step in (("start", 0), ("resume", 2)):
        opened = open_trackers(config_of(wandb="offline"), tmp_path, writes=True)
        opened.event(name, step, {})
        opened.step(line(step + 1, 0.5))
        opened.step(line(step + 2, 0.25))
        opened.event("validation", step + 2, {"loss": 0.75})
        opened.close()
        time.sleep(1.1 if name == "start" else 0)  # the folder's name is the second it was made in
    runs = wandb_records(tmp_path)
    assert len(runs) == 2
    known = (tmp_path / "wandb-id").read_text().strip()
    for records, first in zip(runs, (1, 3), strict=True):
        (run,) = [record.run for record in records if record.HasField("run")][:1]
        assert (run.run_id, run.project, run.display_name) == (known, "atum", "somewhere")
        configured = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert configured["training"]["global_batch_size"] == 3584
        event, *steps, validation = history(records)
        assert steps == [line(first, 0.5), line(first + 1, 0.25)]
        assert event["step"] == first - 1 and validation == {"step": first + 1, "validation/loss": 0.75}
        metrics = [record.metric for record in records if record.HasField("metric")]
        assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]


def test_nothing_is_opened_where_nothing_is_asked_for(tmp_path: Path) -> None:
    both = config_of(tensorboard=True, wandb="offline")
    for config, writes in ((config_of(), True), (both, False)):
        opened = open_trackers(config, tmp_path, writes=writes)
        opened.event("start", 0, {})
        opened.step(line(1, 1.0))
        opened.close()
    assert list(tmp_path.iterdir()) == []


# What goes wrong -----------------------------------------------------------------------------------------------------


class Broken:
    """Fails at the second step."""

    def step(self, values: dict[str, Any]) -> None:
        if values["step"] == 2:
            raise OSError(28, "No space left on device")

    def event(self, name: str, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Stuck:
    """Like a file system that is gone."""

    def __init__(self) -> None:
        self.mended = threading.Event()

    def step(self, values: dict[str, Any]) -> None:
        self.mended.wait(30)

    event, close = Broken.event, Broken.close


def replaced(tracker: Any, monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    monkeypatch.setattr(trackers, "TensorBoard", lambda *_: tracker)
    return open_trackers(config_of(tensorboard=True), folder, writes=True, say=said.append), said


def test_a_failing_tracker_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened, said = replaced(Broken(), monkeypatch, tmp_path)
    for step in range(1, 9):
        opened.step(line(step, 1.0))
    opened.close()
    opened.step(line(9, 1.0))
    assert len(said) == 1 and "TensorBoard" in said[0] and "No space left on device" in said[0]


@pytest.mark.parametrize("waiting", [4, 100])
def test_a_stuck_tracker_holds_nothing_up(waiting: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(trackers, "WAITING", waiting)
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    stuck, began = Stuck(), time.monotonic()
    opened, said = replaced(stuck, monkeypatch, tmp_path)
    for step in range(1, 20):
        opened.step(line(step, 1.0))
    opened.close()
    assert time.monotonic() - began < 5
    stuck.mended.set()
    assert len(said) == 1 and ("lines wait" if waiting == 4 else "to finish") in said[0]


def test_tensorboard_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tensorboard.summary.writer import record_writer

    class Full(record_writer.RecordWriter):  # type: ignore[misc]
        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.RecordWriter", Full)
    said: list[str] = []
    opened = open_trackers(config_of(tensorboard=True), tmp_path, writes=True, say=said.append)
    opened.event("start", 0, {})
    for step in range(1, 50):
        opened.step(line(step, 1.0))
    opened.close()
    assert len(said) == 1 and "No space left on device" in said[0]


@pytest.mark.parametrize("answers", [True, False], ids=["refused", "no answer"])
def test_wandb_without_a_network_is_recorded_offline(
    answers: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as silent:  # listens and never answers; closed, it refuses
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setattr(trackers, "INIT_S", 1.0)
        if answers:
            silent.close()
        said: list[str] = []
        opened = open_trackers(config_of(wandb="online"), tmp_path, writes=True, say=said.append)
        for step in (1, 2):
            opened.step(line(step, 0.5))
        opened.close()
    assert len(said) == 1 and "cannot be reached" in said[0] and "wandb sync" in said[0]
    assert history(wandb_records(tmp_path)[0]) == [line(1, 0.5), line(2, 0.5)]


# Before the run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "package"), [("tensorboard", True, "tensorboard"), ("wandb", "offline", "wandb")]
)
def test_a_missing_package(key: str, value: Any, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(config_of(**{key: value}))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"logging\.{key}=.*pip install 'megatron_atum\[logging\]'"):
        check_trackers(config_of(**{key: value}))
    check_trackers(config_of())


def test_a_folder_is_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "no_such_package").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="no_such_package"):
        trackers._check_package("no_such_package", "logging.x")


def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = config_of(wandb="online")
    with pytest.raises(ConfigError, match="wandb login"):
        check_trackers(config)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    check_trackers(config)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    with pytest.raises(ConfigError, match="wandb login"):
        check_trackers(config)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_trackers(config)
