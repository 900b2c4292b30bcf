"""Requests of one process; whole runs are in tests/faults/test_requests.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_atum.training.requests import Asked, Requests


def wait_for(requests: Requests, name: str) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if requests.seen()[name]:
            return True
        time.sleep(0.01)
    return False


def test_files_count_on_rank_0_and_go_when_they_are_fulfilled(tmp_path: Path) -> None:
    first, other = Requests(tmp_path, 0), Requests(tmp_path, 1)
    assert first.seen() == {"save": 0.0, "stop": 0.0, "signal": 0.0}
    (tmp_path / "save").touch()
    (tmp_path / "stop").touch()
    assert first.seen() == {"save": 1.0, "stop": 1.0, "signal": 0.0}
    assert other.seen() == {"save": 0.0, "stop": 0.0, "signal": 0.0}
    first.fulfilled(Asked(save=True))
    assert not (tmp_path / "save").exists() and (tmp_path / "stop").exists()
    first.fulfilled(Asked(save=True, stop=True))
    assert not (tmp_path / "stop").exists()


def test_a_request_of_any_rank_is_one_of_all() -> None:
    nothing = {"save": 0.0, "stop": 0.0, "signal": 0.0}
    assert not Requests.asked(nothing).ends
    assert Requests.asked({**nothing, "signal": 3.0}) == Asked(signal=True)
    assert Requests.asked({**nothing, "signal": 1.0}).ends and Requests.asked({**nothing, "stop": 1.0}).ends
    assert not Requests.asked({**nothing, "save": 1.0}).ends


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with Requests(tmp_path, 0) as requests:
            os.kill(os.getpid(), number)
            assert wait_for(requests, "signal")
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


PROGRAM = """
import sys, time
from pathlib import Path
from megatron_atum.training.requests import Requests
with Requests(Path("."), 0) as requests:
    print("ready", flush=True)
    time.sleep(60)
"""


def test_two_signals_close_together_are_one_and_the_same_later_ends(tmp_path: Path) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    for _ in range(2):
        program.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert program.poll() is None
    time.sleep(1.2)
    program.send_signal(signal.SIGUSR1)  # not the same again: a job may be preempted while it saves
    time.sleep(0.2)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=10) == 128 + signal.SIGTERM
