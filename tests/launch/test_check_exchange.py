"""What ranks tell each other without collectives, when some of them say nothing too."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_atum.launch import check_exchange
from megatron_atum.launch.check_exchange import Exchange, clock_offsets, tell_time


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[Exchange]:
    """Of ranks 0 to 2, in one process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return [Exchange(rank, 3, 10.0) for rank in range(3)]


def test_silent_ranks_are_missing(exchanges: list[Exchange]) -> None:
    first, second, _ = exchanges
    first.tell("facts", {"a": [1]})
    second.second().tell("facts", {"b": (2, None)})
    began = time.monotonic()
    assert first.heard("facts", 0.5) == {0: {"a": [1]}, 1: {"b": (2, None)}}
    assert 0.4 < time.monotonic() - began < 3
    assert first.heard("facts", 0) == {0: {"a": [1]}, 1: {"b": (2, None)}}  # what is there needs no time
    assert first.heard("facts", 5, [1]) == {1: {"b": (2, None)}}


def test_announcements(exchanges: list[Exchange]) -> None:
    first, second, third = exchanges
    assert second.announced("nodes", 0.2) is None
    threading.Timer(0.3, first.announce, ("nodes", [1, 2])).start()
    assert second.announced("nodes", 10) == third.announced("nodes", 10) == [1, 2]


def test_the_keeper_of_the_store_leaves_last(exchanges: list[Exchange]) -> None:
    first, second, third = exchanges
    second.leave(3)
    left: list[float] = []
    thread = threading.Thread(target=lambda: (first.leave(3), left.append(time.monotonic())))
    thread.start()
    time.sleep(0.3)
    assert left == []
    third.leave(3)
    thread.join(5)
    assert len(left) == 1


def test_clocks_are_compared(exchanges: list[Exchange], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's is two seconds ahead; rank 2 does not answer."""
    ahead = SimpleNamespace(
        time=lambda: time.time() + 2 * (threading.current_thread().name == "ahead"), monotonic=time.monotonic
    )
    monkeypatch.setattr(check_exchange, "time", ahead)
    threading.Thread(target=tell_time, args=(exchanges[1], 10.0), name="ahead").start()
    offsets = clock_offsets(exchanges[0], [1, 2], 2.0)
    assert offsets.keys() == {1}
    offset, error = offsets[1]
    assert abs(offset - 2) <= error < 1


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "9")
    with pytest.raises(RuntimeError):
        Exchange(1, 2, 1.0)


def test_a_step_that_takes_too_long() -> None:
    code = (
        "import time\n"
        "from megatron_atum.launch.check_exchange import Deadline\n"
        "deadline = Deadline(0.5, lambda step: print('late:', step, flush=True))\n"
        "for step in ('a', 'b', 'c'):\n"
        "    deadline.step(step)\n"
        "    time.sleep(0.3 if step != 'c' else 60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (1, "late: c\n"), done.stderr
