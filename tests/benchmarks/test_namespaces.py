"""Fake nodes count and cap what they should, and nothing of them is left, whatever happens to the run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from benchmarks import namespaces
from benchmarks.namespaces import FakeNodes, fake_nodes, remove_leftovers, undisturbed, why_not

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[2]
PORT = 5000


@pytest.fixture(scope="module")
def rights() -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"root: {reason}")


def names() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def on(nodes: FakeNodes, node: int, work: Callable[[], None]) -> threading.Thread:
    """A thread that moves to a node and works there."""

    def run() -> None:
        nodes.move_to(node)
        work()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def send(nodes: FakeNodes, senders: list[int], receiver: int, size: int) -> float:
    """Each sender sends so many bytes. Seconds until all have arrived."""
    listening, arrived = threading.Event(), []

    def read(connection: socket.socket) -> None:
        with connection:
            arrived.append(sum(map(len, iter(lambda: connection.recv(2**16), b""))))

    def listen() -> None:
        with socket.create_server((nodes.address(receiver), PORT), backlog=8) as server:
            listening.set()
            readers = [threading.Thread(target=read, args=server.accept()[:1]) for _ in senders]
            for action in (threading.Thread.start, threading.Thread.join):
                for reader in readers:
                    action(reader)

    def talk() -> None:
        with socket.create_connection((nodes.address(receiver), PORT)) as connection:
            connection.sendall(bytes(size))

    receiving = on(nodes, receiver, listen)
    assert listening.wait(10)
    began = time.monotonic()
    for thread in [on(nodes, sender, talk) for sender in senders] + [receiving]:
        thread.join(30)
    assert arrived == [size] * len(senders)
    return time.monotonic() - began


@pytest.mark.root
@pytest.mark.usefixtures("rights")
def test_bytes_to_other_nodes_are_counted_and_those_inside_are_not() -> None:
    size = 2_000_000
    with fake_nodes(2) as nodes:
        assert [nodes.bytes_out(node) for node in (0, 1)] == [0, 0]
        send(nodes, [0, 0], 0, size)
        assert [nodes.bytes_out(node) for node in (0, 1)] == [0, 0]
        send(nodes, [0], 1, size)
        assert size < nodes.bytes_out(0) < 1.02 * size
        assert 0 < nodes.bytes_out(1) < 0.02 * size  # acknowledgements


@pytest.mark.root
@pytest.mark.usefixtures("rights")
def test_a_cap_holds_in_each_direction_and_can_change() -> None:
    cap, size = 1e6, 400_000
    with fake_nodes(3) as nodes:
        nodes.set_cap(cap)
        seconds = send(nodes, [0], 2, size)
        assert 0.9 * size / cap < seconds
        assert send(nodes, [0, 1], 2, size) > 0.9 * 2 * size / cap  # what a node receives is capped, too
        nodes.set_cap(20 * cap)
        assert 0.9 * size / (20 * cap) < send(nodes, [0], 2, size) < seconds
        nodes.set_cap(None)
        assert send(nodes, [0], 2, size) < seconds
        nodes.set_cap(None)


@pytest.mark.root
@pytest.mark.usefixtures("rights")
def test_all_is_gone_after_an_error_with_the_processes_inside() -> None:
    with pytest.raises(ZeroDivisionError), fake_nodes(2) as nodes:
        process = subprocess.Popen([*nodes.enter(1), "sleep", "100"])
        others = [nodes.name(0), nodes.name(1), nodes.switch]
        assert all(name in names() for name in others)
        raise ZeroDivisionError
    assert not any(name in names() for name in others)
    assert process.wait(10) == -signal.SIGKILL


def stop(*_: object) -> None:
    raise InterruptedError


@pytest.fixture
def stoppable() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("stoppable")
def test_signals_wait_for_what_is_not_to_be_disturbed() -> None:
    reached = False
    with pytest.raises(InterruptedError), undisturbed():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        reached = True
    assert reached and signal.getsignal(signal.SIGTERM) is stop


@pytest.mark.root
@pytest.mark.usefixtures("rights", "stoppable")
def test_a_signal_does_not_cut_the_clean_up_short(monkeypatch: pytest.MonkeyPatch) -> None:
    remove = namespaces._remove

    def disturbed(namespace: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        remove(namespace)

    monkeypatch.setattr(namespaces, "_remove", disturbed)
    with pytest.raises(InterruptedError), fake_nodes(1) as nodes:
        assert nodes.prefix in names()
    assert nodes.prefix not in names()


KILLED = """
import os, signal, subprocess, sys
sys.path.insert(0, sys.argv[1])
from benchmarks.namespaces import fake_nodes
with fake_nodes(1) as nodes:
    sleeper = subprocess.Popen([*nodes.enter(0), "sleep", "100"], stdout=subprocess.DEVNULL)
    print(nodes.prefix, sleeper.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.root
@pytest.mark.usefixtures("rights")
def test_what_a_killed_run_has_left_is_removed_and_nothing_else() -> None:
    with fake_nodes(1) as alive:
        killed = subprocess.run([sys.executable, "-c", KILLED, str(ROOT)], stdout=subprocess.PIPE, text=True)
        assert killed.returncode == -signal.SIGKILL
        prefix, pid = killed.stdout.split()
        assert runs(int(pid))
        assert sorted(name for name in remove_leftovers() if name.startswith(prefix)) == [
            f"{prefix}-0",
            f"{prefix}-switch",
        ]
        assert prefix not in names() and alive.name(0) in names()
        deadline = time.monotonic() + 10
        while runs(int(pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert why_not() == "needs root, and runs as user 1000"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install iproute2" in str(why_not())
    for name in ("ip", "tc", "nsenter"):
        (tmp_path / name).write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 2\n")
        (tmp_path / name).chmod(0o755)
    assert "Operation not permitted" in str(why_not())


@pytest.mark.parametrize("count", [0, 251])
def test_a_number_of_nodes_that_has_no_addresses_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count={count}"), fake_nodes(count):
        pass
