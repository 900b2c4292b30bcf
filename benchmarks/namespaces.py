"""Fake nodes on one machine: Linux network namespaces on a bridge, each with a link whose rate can be capped.

    with fake_nodes(2) as nodes:
        process = subprocess.Popen([*nodes.enter(0), "python", "program.py"])   # listens on nodes.address(0)
        nodes.set_cap(2.5e6)                                                    # bytes/s, while programs run
        sent = nodes.bytes_out(0)

A node is a namespace with one interface, `eth0`. What its processes send to each other at its own address goes over its
loopback: neither capped nor counted. What they send to other nodes passes a token bucket at `eth0`, and what they
receive one at the bridge's end of the link, so a cap holds for each direction by itself. The kernel needs namespaces,
veth, bridge and the tbf queueing discipline; the caller must be root (`why_not`).

Addresses may repeat between runs: each run has a bridge of its own, in a namespace of its own, and nothing leads out of
it. Names tell which process made them, so a later run also removes what a killed one has left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "atum"
INTERFACE = "eth0"
SUBNET = "10.77.0"
MOST_NODES = 250
# A segment of the kernel's own making passes the token bucket as a whole. With segments of 64 KiB a bucket would let as
# much through at once after each pause, at any cap.
SEGMENT = 16384
LEAST_BURST = SEGMENT + 600  # bytes: one segment with its headers
BURST_S = 2e-3  # of the rate: how late the kernel's timer may be without a loss
WINDOW = "64"  # packets that a connection begins with
QUEUE = 16 * 2**20  # bytes that may wait at a link: more than connections ever keep on the way
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLONE_NEWNET = 0x40000000
_NAME = re.compile(rf"{PREFIX}-(\d+)-(\d+)-[0-9a-f]{{6}}-\w+")


@dataclass(frozen=True)
class FakeNodes:
    """Made by `fake_nodes`."""

    prefix: str  # of the namespaces' names, this run's own
    count: int

    @property
    def switch(self) -> str:
        return f"{self.prefix}-switch"

    def name(self, node: int) -> str:
        """The node's namespace, as `ip netns` calls it."""
        return f"{self.prefix}-{node}"

    def address(self, node: int) -> str:
        return f"{SUBNET}.{node + 1}"

    def enter(self, node: int) -> list[str]:
        """What to put in front of a command that is to run on a node. The process keeps its own id.

        Not `ip netns exec`: that mounts /sys anew, without what lies below it (cgroups).
        """
        return ["nsenter", f"--net={self._file(node)}"]

    def move_to(self, node: int) -> None:
        """Move the calling thread to a node, and with it the threads and processes that it starts from here on."""
        libc = ctypes.CDLL(None, use_errno=True)  # os.setns comes with Python 3.12
        with open(self._file(node)) as file:
            if libc.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.name(node)} failed")

    def _file(self, node: int) -> str:
        return f"/run/netns/{self.name(node)}"

    def set_cap(self, bytes_per_s: float | None) -> None:
        """The most that each link carries in each direction; None: no limit. Best while nothing is under way."""
        for node in range(self.count):
            for namespace, interface in ((self.name(node), INTERFACE), (self.switch, f"p{node}")):
                _set_rate(namespace, interface, bytes_per_s)

    def bytes_out(self, node: int) -> int:
        """Bytes that the node has sent to others since it was made, headers of its segments included."""
        shown = json.loads(_run("ip", "-j", "-s", "-n", self.name(node), "link", "show", "dev", INTERFACE))
        return int(shown[0]["stats64"]["tx"]["bytes"])


@contextlib.contextmanager
def fake_nodes(count: int) -> Iterator[FakeNodes]:
    """Namespaces of so many nodes, without a cap. All are removed at the end, with the processes left in them.

    Raises:
        RuntimeError: a command failed; `why_not` says beforehand whether this machine can do it.
    """
    if not 1 <= count <= MOST_NODES:
        raise ValueError(f"count={count}: must be from 1 to {MOST_NODES}")
    remove_leftovers()
    nodes = FakeNodes(f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(3)}", count)
    try:
        _make(nodes)
        yield nodes
    finally:
        with undisturbed(), contextlib.ExitStack() as removals:  # goes through all of them, also if one fails
            for namespace in _namespaces():
                if namespace.startswith(f"{nodes.prefix}-"):
                    removals.callback(_remove, namespace)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What `STOPPING` does to this process waits until the end of the block.

    By other handlers, not by a mask of the main thread: threads of libraries would take the signals then, and Python
    would handle them in the main thread all the same. It interrupts no other thread, where this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: waiting.append(number)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in waiting:
            signal.raise_signal(late)


def remove_leftovers() -> list[str]:
    """Remove the namespaces whose maker is gone, with the processes left in them. Returns their names."""
    left = []
    for namespace in _namespaces():
        match = _NAME.fullmatch(namespace)
        if match and _start_time(int(match[1])) != int(match[2]):
            _remove(namespace)
            left.append(namespace)
    return left


def why_not() -> str | None:
    """Why this process cannot make fake nodes; None if it can. Tries it out on one."""
    if os.geteuid() != 0:
        return f"needs root, and runs as user {os.geteuid()}"
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"needs the program {program} (Debian: apt-get install {package})"
    try:
        with fake_nodes(1) as nodes:
            nodes.set_cap(1e6)
            _run(*nodes.enter(0), "true")
    except (RuntimeError, OSError) as error:
        return f"cannot make network namespaces with a capped link (rights, or the kernel): {error}"
    return None


def _make(nodes: FakeNodes) -> None:
    ip = ("ip", "-n", nodes.switch)
    _run("ip", "netns", "add", nodes.switch)
    _run(*ip, "link", "add", "br0", "type", "bridge")
    _run(*ip, "link", "set", "br0", "addrgenmode", "none", "up")
    for node in range(nodes.count):
        name, peer = nodes.name(node), f"p{node}"
        _run("ip", "netns", "add", name)
        ends = ("type", "veth", "peer", "name", peer, "netns", nodes.switch)
        _run("ip", "link", "add", INTERFACE, "netns", name, *ends)
        _run("ip", "-n", name, "addr", "add", f"{nodes.address(node)}/24", "dev", INTERFACE)
        _run(*ip, "link", "set", peer, "master", "br0")
        # Without an address of IPv6 nothing is sent that no program asked for.
        for namespace, interface in ((name, INTERFACE), (nodes.switch, peer)):
            options = ("addrgenmode", "none", "gso_max_size", str(SEGMENT), "up")
            _run("ip", "-n", namespace, "link", "set", "dev", interface, *options)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        _steady_tcp(nodes, node)


def _steady_tcp(nodes: FakeNodes, node: int) -> None:
    """What is to be seen is a network, not how TCP gets to know it.

    Nothing is lost here, but a changed cap changes delays a hundredfold, which TCP would take for losses; and after
    each pause it would begin with a few packets. A connection may have a few segments waiting at its link, not the
    megabytes that it may otherwise: the short messages with which ranks agree on the next exchange stand behind them.
    """
    route = (f"{SUBNET}.0/24", "dev", INTERFACE, "proto", "kernel", "scope", "link", "src", nodes.address(node))
    _run("ip", "-n", nodes.name(node), "route", "change", *route, "initcwnd", WINDOW, "rto_min", "2s")
    settings = {"tcp_slow_start_after_idle": 0, "tcp_early_retrans": 0, "tcp_limit_output_bytes": 4 * SEGMENT}
    for setting, value in settings.items():
        _run(*nodes.enter(node), "sh", "-c", f"echo {value} >/proc/sys/net/ipv4/{setting}")


def _set_rate(namespace: str, interface: str, bytes_per_s: float | None) -> None:
    tc = ("tc", "-n", namespace, "qdisc")
    if bytes_per_s is None:
        if " tbf " in _run(*tc, "show", "dev", interface):
            _run(*tc, "del", "dev", interface, "root")
        return
    burst = max(LEAST_BURST, round(bytes_per_s * BURST_S))
    bucket = ("rate", f"{round(8 * bytes_per_s)}bit", "burst", f"{burst}b", "limit", f"{QUEUE}b")
    _run(*tc, "replace", "dev", interface, "root", "tbf", *bucket)


def _remove(namespace: str) -> None:
    """A namespace lives on without its name as long as a process is in it."""
    try:
        for pid in _run("ip", "netns", "pids", namespace).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _run("ip", "netns", "del", namespace)
    except RuntimeError:
        if namespace in _namespaces():  # else another run has found the same leftover and was faster
            raise


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _start_time(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None where none runs. Ids are used again, pairs are not."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _run(*command: str) -> str:
    # In a group of its own: Ctrl-C of a terminal does not reach it and cannot cut a clean-up short.
    done = subprocess.run(command, capture_output=True, text=True, process_group=0)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
