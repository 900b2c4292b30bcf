"""A save that cannot be written: said clearly, the checkpoint before it stays, and the training goes on."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.checkpoint.folder import damaged, missing, step_folder
from tests.faults.runs import (
    SMALL,
    Outcome,
    checkpoints_of,
    data_overrides,
    events_of,
    lines_of,
    metrics_of,
    numbers_of,
    run,
)

BAD_STEP = 4
STEPS = 7  # the save after the last step is one more
GOOD_STEPS = [2, 6, 7]


def overrides(data: Path, asynchronous: bool = True, steps: int = STEPS) -> list[str]:
    run_keys = [f"training.steps={steps}", "checkpoint.save_every=2", "checkpoint.keep=0", "parallel.pipeline=2"]
    return [*SMALL, *data_overrides(data), *run_keys, f"checkpoint.asynchronous={str(asynchronous).lower()}"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[dict[str, Any]]:
    """The numbers of a run whose saves are all well."""
    root = tmp_path_factory.mktemp("well")
    assert run(root, overrides(data), 2).codes == [0, 0]
    return numbers_of(root)


def check_went_on(root: Path, outcome: Outcome, expected: list[dict[str, Any]], reason: str) -> None:
    log = outcome.logs[0]
    assert outcome.codes == [0, 0], outcome.logs
    (failed,) = events_of(root, "save_failed")
    assert failed["step"] == BAD_STEP and reason in failed["error"], failed
    assert str(step_folder(checkpoints_of(root), BAD_STEP)) in failed["error"]
    assert reason in log and "training goes on; the checkpoint before it is as it was" in log
    assert "Traceback" not in log
    assert [event["step"] for event in events_of(root, "save")] == GOOD_STEPS
    assert numbers_of(root) == expected
    check_left(root, GOOD_STEPS)


def check_left(root: Path, steps: list[int]) -> None:
    """Just these checkpoints are there, whole, and nothing half written."""
    checkpoints = checkpoints_of(root)
    assert sorted(checkpoints.glob("step-*")) == [step_folder(checkpoints, step) for step in steps]
    for step in steps:
        assert missing(step_folder(checkpoints, step)) == damaged(step_folder(checkpoints, step)) == []
    assert list((root / "run").rglob("*.tmp")) == []


# Errors that a patch raises ------------------------------------------------------------------------------------------


def full(error: int = errno.ENOSPC) -> OSError:
    return OSError(error, os.strerror(error))


def break_save(where: str, bad_rank: int, step: int, rank: int) -> None:
    """Let one operation of one step's save fail on one rank."""
    from megatron_atum.checkpoint import files, tensor_file

    if rank != bad_rank:
        return
    bad = f"step-{step:08d}"
    if where == "write":
        put = tensor_file.TensorFileWriter._put

        def broken_put(self: Any, content: Any) -> None:
            if bad in str(self.path) and self._written > 1000:
                raise full()
            put(self, content)

        tensor_file.TensorFileWriter._put = broken_put  # type: ignore
    elif where == "fsync":
        fsync = os.fsync

        def broken_fsync(handle: int) -> None:
            if bad in os.readlink(f"/proc/self/fd/{handle}"):
                raise full(errno.EDQUOT)
            fsync(handle)

        os.fsync = broken_fsync  # type: ignore
    else:
        sync = files.sync

        def broken_sync(path: Path) -> None:
            if path.name == "complete.json.tmp" and bad in str(path):
                raise full()
            sync(path)

        files.sync = broken_sync


@pytest.mark.parametrize(
    ("where", "bad_rank", "asynchronous", "reason"),
    [
        ("write", 1, True, "rank 1: [Errno 28] No space left on device"),
        ("write", 0, False, "rank 0: [Errno 28] No space left on device"),
        ("fsync", 1, True, "rank 1: [Errno 122] Disk quota exceeded"),
        ("record", 0, True, "rank 0: [Errno 28] No space left on device"),
    ],
)
def test_a_failed_save_does_not_stop_the_run(
    where: str,
    bad_rank: int,
    asynchronous: bool,
    reason: str,
    expected: list[dict[str, Any]],
    data: Path,
    tmp_path: Path,
) -> None:
    hook = partial(break_save, where, bad_rank, BAD_STEP)
    outcome = run(tmp_path, overrides(data, asynchronous), 2, hook=hook)
    check_went_on(tmp_path, outcome, expected, reason)


def test_a_failed_last_save_is_an_error_and_a_resume_mends_it(
    expected: list[dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    outcome = run(tmp_path, overrides(data), 2, hook=partial(break_save, "write", 1, STEPS))
    assert outcome.codes == [2, 2], outcome.logs
    last = outcome.logs[0].strip().splitlines()[-1]
    assert last.startswith("pretrain_atum: CheckpointError: ") and "step-00000007 could not be written" in last
    assert "rank 1: [Errno 28] No space left on device" in last
    assert not any("Traceback" in log for log in outcome.logs)
    check_left(tmp_path, [2, 4, 6])

    again = run(tmp_path, overrides(data), 2)
    assert again.codes == [0, 0], again.logs
    assert [event["step"] for event in events_of(tmp_path, "resume")] == [6]
    assert numbers_of(tmp_path) == expected
    check_left(tmp_path, [2, 4, 6, 7])


# Errors that the system makes ----------------------------------------------------------------------------------------


def before_save_and_after_failure(step: int, spoil: Any, mend: Any) -> None:
    """Call `spoil` when the save of a step starts on this rank, and `mend` when its failure has been told."""
    from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint
    from megatron_atum.training.trainer import Trainer

    save, tell = RunCheckpoint.save, Trainer._tell

    def spoiled(self: Any, at: int, *state: Any) -> Any:
        if at == step:
            spoil()
        return save(self, at, *state)

    def mended(self: Any, saves: Any) -> None:
        tell(self, saves)
        if any(one.error for one in saves):
            mend()

    RunCheckpoint.save, Trainer._tell = spoiled, mended  # type: ignore


def full_device(checkpoints: Path, rank: int) -> None:
    """The file of rank 1 is the device on which every write finds no space."""
    aside = checkpoints / f"step-{BAD_STEP:08d}.tmp"

    def spoil() -> None:
        aside.mkdir(parents=True, exist_ok=True)
        (aside / "weights-00001-0.safetensors").symlink_to("/dev/full")

    if rank == 1:
        before_save_and_after_failure(BAD_STEP, spoil, lambda: None)


def test_a_write_that_finds_no_space(expected: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    outcome = run(tmp_path, overrides(data), 2, hook=partial(full_device, checkpoints_of(tmp_path)))
    check_went_on(tmp_path, outcome, expected, "rank 1: [Errno 28] No space left on device")


def no_folder(checkpoints: Path, rank: int) -> None:
    """Where the checkpoints were is a file, until it is noticed."""
    away = checkpoints.with_name("away")

    def spoil() -> None:
        checkpoints.rename(away)
        checkpoints.write_text("not a folder")

    def mend() -> None:
        checkpoints.unlink()
        away.rename(checkpoints)

    if rank == 0:
        before_save_and_after_failure(BAD_STEP, spoil, mend)


def test_storage_that_goes_away_and_comes_back(expected: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    # Synchronous: no rank writes before both have come to the save.
    outcome = run(tmp_path, overrides(data, False), 2, hook=partial(no_folder, checkpoints_of(tmp_path)))
    check_went_on(tmp_path, outcome, expected, "Not a directory")


@contextlib.contextmanager
def mounted(place: Path, size: str) -> Iterator[Path]:
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill_disk(folder: Path, left: int, rank: int) -> None:
    """Another file takes all space but `left` bytes, until the save has failed."""
    ballast = folder / "ballast"

    def spoil() -> None:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        os.truncate(ballast, max(0, ballast.stat().st_size - left))

    if rank == 0:
        before_save_and_after_failure(BAD_STEP, spoil, ballast.unlink)


@pytest.mark.root
@pytest.mark.parametrize("left", [65536, 0], ids=["room for the metrics", "no room at all"])
def test_a_full_disk(left: int, expected: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "48m") as root:
        outcome = run(root, overrides(data), 2, hook=partial(fill_disk, root, left))
        check_went_on(root, outcome, expected, "[Errno 28] No space left on device")


def fill_disk_for_long(root: Path, rank: int) -> None:
    """No byte is left, the page of the metrics is full to its end, and the save is held up for two more steps."""
    from megatron_atum.checkpoint import run_checkpoint
    from megatron_atum.training.run_log import RunLog

    logged, log, write_items, metrics = threading.Event(), RunLog.step, run_checkpoint.write_items, metrics_of(root)

    def logging(self: Any, values: Any) -> None:
        log(self, values)
        if values["step"] == BAD_STEP:
            line = json.dumps({"event": "padding", "step": BAD_STEP})
            metrics.open("a").write(line + " " * (-(metrics.stat().st_size + len(line) + 1) % 4096) + "\n")
        if values["step"] == BAD_STEP + 1:
            logged.set()

    def held_up(folder: Path, *args: Any) -> Any:
        assert f"{BAD_STEP:08d}" not in folder.name or logged.wait(60)
        return write_items(folder, *args)

    fill_disk(root, 0, rank)
    RunLog.step = logging if rank == 0 else log  # type: ignore
    run_checkpoint.write_items = held_up if rank == 0 else write_items  # type: ignore


@pytest.mark.root
def test_a_full_disk_while_steps_are_logged(expected: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    """What a step has to say is not worth the run: it is kept until there is room again."""
    with mounted(tmp_path / "disk", "48m") as root:
        outcome = run(root, overrides(data), 2, hook=partial(fill_disk_for_long, root))
        check_went_on(root, outcome, expected, "[Errno 28] No space left on device")


def read_only(disk: Path, rank: int) -> None:
    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

    if rank == 0:
        before_save_and_after_failure(BAD_STEP, partial(remount, "ro"), partial(remount, "rw"))


@pytest.mark.root
def test_a_disk_that_turns_read_only(expected: list[dict[str, Any]], data: Path, tmp_path: Path) -> None:
    with mounted(checkpoints_of(tmp_path), "48m") as disk:
        outcome = run(tmp_path, overrides(data, False), 2, hook=partial(read_only, disk))
        check_went_on(tmp_path, outcome, expected, "Read-only file system")


def test_the_first_save_fails(data: Path, tmp_path: Path) -> None:
    """There is no checkpoint before it, and the frozen weights are written with the next."""
    outcome = run(tmp_path, overrides(data, steps=4), 2, hook=partial(break_save, "write", 1, 2))
    assert outcome.codes == [0, 0], outcome.logs
    assert [line["step"] for line in lines_of(tmp_path) if line.get("event") == "save_failed"] == [2]
    check_left(tmp_path, [4])
