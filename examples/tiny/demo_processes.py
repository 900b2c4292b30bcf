"""Runs the commands of the demo: shows them, logs them, and stops what is left of them."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import psutil

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core warns without it
    "PYTHONPATH": os.pathsep.join([".", *filter(None, [os.environ.get("PYTHONPATH")])]),  # not installed is fine too
}
STOP_SECONDS = 10.0  # that torchrun has to stop its workers


class StepFailed(Exception):
    """A step of the demo did not do what it should. The message says what, and where the log is."""


def say(text: str = "") -> None:
    print(text, flush=True)


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def torchrun(*arguments: object) -> list[str]:
    """A launch of the trainer at the layout of the demo."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", 4, "--master-port", free_port())
    layout = ("parallel.tensor=2", "parallel.pipeline=2")
    return python(*launcher, "pretrain_atum.py", *arguments, *layout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(command: list[str]) -> str:
    """A command as one would type it in the root of the repository."""
    program = Path(command[0])
    first = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else str(program)
    return shlex.join([first, *command[1:]])


@contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command; on the way out of the block, whatever is left of it is stopped.

    On a terminal the child writes to it directly, so that it can draw its progress bar; elsewhere its output is copied
    here and to the log. Its error output always goes to the log.
    """
    say(f"$ {shown(command)}")
    terminal = sys.stdout.isatty()
    with log.open("ab", buffering=0) as file:
        file.write(f"$ {shown(command)}\n".encode())
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=None if terminal else subprocess.PIPE,
            stderr=file,
            start_new_session=True,  # Ctrl-C reaches this program, which then stops the child
        )
        copier = threading.Thread(target=copy_lines, args=(process.stdout, file)) if process.stdout else None
        try:
            if copier:
                copier.start()
            yield process
        finally:
            stop(process)
            if copier:
                copier.join()


def copy_lines(source: IO[bytes], log: IO[bytes]) -> None:
    for line in source:
        log.write(line)
        say("  " + line.decode(errors="replace").rstrip())


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all its descendants. torchrun's workers have sessions of their own, so they are looked up."""
    if process.poll() is not None:
        return
    family = descendants(process.pid)
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in family:
        if child.is_running():
            child.kill()
    process.wait()


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(process: subprocess.Popen[bytes], script: str) -> int:
    """SIGKILL to a torchrun and everything it started. Returns the number of workers that ran `script`."""
    family = descendants(process.pid)
    workers = [child for child in family if script in child.cmdline()]
    if not workers:
        raise StepFailed(f"no worker of {script} is left to be killed")
    process.kill()
    for child in family:  # workers have sessions of their own and would outlive torchrun
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)
    return len(workers)


def execute(command: list[str], log: Path) -> None:
    """Run a command to its end. Raises StepFailed with the end of its log."""
    with running(command, log) as process:
        code = process.wait()
    if code:
        raise StepFailed(f"exit code {code} of: {shown(command)}\n{tail(log)}\nlog: {log}")


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join("  | " + line for line in path.read_text(errors="replace").splitlines()[-lines:])
