"""Signals, files in the run folder, ranks that die or hang. Whole runs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.runs import RUN, SMALL, Outcome, checkpoints_of, data_overrides, events_of, numbers_of, run

STEPS = 6
REQUEUE = 85


def trained(root: Path, data: Path, *changes: str, hook: Callable[[int], None] | None = None, **more: Any) -> Outcome:
    settings = [f"training.steps={STEPS}", "checkpoint.save_every=100", "parallel.pipeline=2", *changes]
    return run(root, [*SMALL, *data_overrides(data), *settings], 2, hook=hook, **more)


def _in_step(number: int, act: Callable[[], None]) -> None:
    """Acts in this process in the middle of a step."""
    from megatron_atum.training.engine import Engine

    forward_backward, begun = Engine.forward_backward, []

    def acting(self: Engine, batches: Any) -> Any:
        begun.append(1)
        if len(begun) == number:
            act()
        return forward_backward(self, batches)

    Engine.forward_backward = acting  # type: ignore[method-assign]


def term_to_rank_1(rank: int) -> None:
    if rank == 1:
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))


def usr1_to_rank_0(rank: int) -> None:
    if rank == 0:
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))


def term_twice_at_once(rank: int) -> None:
    """As a launcher does: the process group has it, and it passes it on."""

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    _in_step(3, twice)


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("uninterrupted")
    assert trained(root, data).codes == [0, 0]
    return numbers_of(root)


def signals_to_everyone(rank: int) -> None:
    """As a scheduler does: to the training processes and to those that read data for them."""

    def signal_all() -> None:
        for process in [*psutil.Process().children(), psutil.Process()]:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.5)  # a worker that the signal ended would be missed

    multiprocessing.set_start_method("fork", force=True)  # as it is where no fork server started this process
    _in_step(3, signal_all)


def test_data_workers_stay_for_the_last_steps(data: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    changes = ["data.workers=1", "training.global_batch_size=2"]
    outcome = trained(tmp_path, data, *changes, hook=signals_to_everyone)
    assert outcome.codes == [REQUEUE, REQUEUE], outcome.logs
    assert trained(tmp_path, data, *changes).codes == [0, 0]
    assert numbers_of(tmp_path) == uninterrupted


def usr1_to_the_workers(rank: int) -> None:
    """It must not look as if the training process had been asked."""

    def signal_workers() -> None:
        for process in psutil.Process().children():
            process.send_signal(signal.SIGUSR1)
            print("signalled a worker")
        time.sleep(0.3)

    multiprocessing.set_start_method("fork", force=True)
    _in_step(2, signal_workers)


def test_a_signal_to_the_workers_alone_is_none(data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, "data.workers=1", hook=usr1_to_the_workers)
    assert outcome.codes == [0, 0], outcome.logs
    assert "signalled a worker" in outcome.logs[0]


@pytest.mark.parametrize("hook", [term_to_rank_1, usr1_to_rank_0, term_twice_at_once])
def test_a_signal_to_any_rank_saves_and_asks_for_a_requeue(
    hook: Callable[[int], None], data: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path
) -> None:
    outcome = trained(tmp_path, data, hook=hook)
    assert outcome.codes == [REQUEUE, REQUEUE], outcome.logs
    assert (checkpoints_of(tmp_path) / "step-00000003" / "complete.json").exists()
    assert [event["step"] for event in events_of(tmp_path, "signal")] == [3]
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["exit_code"] == REQUEUE
    assert trained(tmp_path, data).codes == [0, 0]
    assert numbers_of(tmp_path) == uninterrupted


def hang_and_be_told_twice(rank: int) -> None:
    """Rank 1 hangs, so rank 0 waits in a collective when its second signal comes."""
    if rank == 1:
        _in_step(3, lambda: time.sleep(1000))
    else:
        _in_step(3, lambda: threading.Thread(target=_tell_twice, daemon=True).start())


def _tell_twice() -> None:
    for _ in range(2):
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_signal_ends_a_rank_that_waits_for_others(data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = trained(tmp_path, data, hook=hang_and_be_told_twice)
    assert outcome.codes[0] == 128 + signal.SIGTERM, outcome.logs
    assert time.monotonic() - began < 60


def ask_for_a_save(rank: int) -> None:
    if rank == 0:
        _in_step(2, lambda: _touch("save"))


def ask_to_stop(rank: int) -> None:
    if rank == 0:
        _in_step(2, lambda: _touch("stop"))


def _touch(name: str) -> None:
    import sys

    root = next(argument.split("=", 1)[1] for argument in sys.argv if argument.startswith("logging.root="))
    (Path(root) / RUN / name).touch()


def test_the_file_save_saves_and_goes_on(data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, hook=ask_for_a_save)
    assert outcome.codes == [0, 0], outcome.logs
    assert [event["step"] for event in events_of(tmp_path, "save")] == [2, STEPS]
    assert not (tmp_path / RUN / "save").exists()


def test_the_file_stop_saves_and_ends(data: Path, uninterrupted: list[dict[str, Any]], tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, hook=ask_to_stop)
    assert outcome.codes == [0, 0], outcome.logs
    assert [event["step"] for event in events_of(tmp_path, "save")] == [2]
    assert json.loads((tmp_path / RUN / "summary.json").read_text())["ended"] == "stopped"
    assert not (tmp_path / RUN / "stop").exists()
    assert trained(tmp_path, data).codes == [0, 0]
    assert numbers_of(tmp_path) == uninterrupted


# Ranks that fall out -------------------------------------------------------------------------------------------------


def hang_rank_1(rank: int) -> None:
    if rank == 1:
        _in_step(3, lambda: time.sleep(1000))


def kill_rank_1(rank: int) -> None:
    if rank == 1:
        _in_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail_on_rank_1(rank: int) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    if rank == 1:
        _in_step(3, fail)


def test_a_rank_that_hangs_is_named(data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, "health.step_timeout_s=4", hook=hang_rank_1, outlive_s=3.0)
    assert outcome.codes[0] == 1, outcome.logs
    said = outcome.logs[0].splitlines()[-1]
    host = socket.gethostname()
    assert f"rank 0 on {host} failed after step 2: no progress for" in said
    assert f"Look first at rank 1 (step 2, host {host}, process" in said
    assert "stands still in" in said and "test_requests.py" in said
    assert "in acting" in outcome.logs[1], "its stack is shown"
    assert "Look first" not in outcome.logs[1]


def test_a_rank_that_is_killed_is_named_within_seconds(data: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    outcome = trained(tmp_path, data, hook=kill_rank_1, outlive_s=8.0)
    assert outcome.codes == [1, -signal.SIGKILL], outcome.logs
    assert "Look first at rank 1 (step 2, host" in outcome.logs[0] and "says nothing: dead" in outcome.logs[0]
    assert time.monotonic() - began < 60


def test_a_rank_that_fails_says_why_and_the_others_who(data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, hook=fail_on_rank_1, outlive_s=8.0)
    assert outcome.codes == [1, 1], outcome.logs
    assert "rank 1 on" in outcome.logs[1] and "failed after step 2: a bug" in outcome.logs[1]
    assert "rank 0 on" in outcome.logs[0] and "Look first at rank 1 (step 2, host" in outcome.logs[0]
    assert outcome.logs[0].rstrip().endswith("a bug")
