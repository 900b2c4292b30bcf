"""What a running job is asked for from outside: signals, and files in its run folder.

SIGTERM and SIGUSR1 ask for a checkpoint and an end that is to be continued (exit code 85); the same one again ends the
process at once. Both may come: who was told of the time limit may be preempted while it saves. RUN/save asks for a
checkpoint, RUN/stop for one and an end; both files are removed when it is done. A request counts once any rank has
seen it: all ranks learn of it together with the losses of the step. RUN/stop counts more than a signal: who wrote it
does not want the job started again.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_atum.data.loader import SAME_REQUEST_S

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Asked:
    """The same on every rank."""

    save: bool = False
    stop: bool = False  # by file
    signal: bool = False

    @property
    def ends(self) -> bool:
        return self.stop or self.signal

    @property
    def is_continued(self) -> bool:
        return self.signal and not self.stop


class Requests:
    """Of this process; on rank 0 also the files. Signals are taken while it is in use as a context manager.

    Python runs a handler only between two steps of the main thread's own code, and that thread may be waiting in a
    collective for ever. So a thread of ours reads the signals from where Python's low-level handler writes them.
    """

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._files = {name: run_folder / name for name in ("save", "stop")} if rank == 0 else {}
        self._first_at: dict[int, float] = {}  # by signal
        self._deaf = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Requests:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, _no_action) for number in SIGNALS}
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()  # ends the thread

    def seen(self) -> dict[str, float]:
        """By this rank: numbers that are summed over all ranks."""
        files = {name: float(name in self._files and self._files[name].exists()) for name in ("save", "stop")}
        return {**files, "signal": float(bool(self._first_at))}

    @staticmethod
    def asked(sums: Mapping[str, float]) -> Asked:
        """From the sums of `seen`."""
        return Asked(save=sums["save"] > 0, stop=sums["stop"] > 0, signal=sums["signal"] > 0)

    def ignore_more(self) -> None:
        """The checkpoint is complete, and what is left to do takes seconds: a launcher that ends the other ranks once
        the first is through must not end this one in the middle of it."""
        self._deaf = True

    def fulfilled(self, asked: Asked) -> None:
        """Remove the files of what has been done."""
        for name, path in self._files.items():
            if getattr(asked, name):
                path.unlink(missing_ok=True)

    def _listen(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(64):
                for number in numbers:
                    if number in SIGNALS:
                        self._take(number)

    def _take(self, number: int) -> None:
        now = time.monotonic()
        if now - self._first_at.setdefault(number, now) > SAME_REQUEST_S and not self._deaf:
            os._exit(128 + number)


def _no_action(number: int, frame: FrameType | None) -> None:
    """Instead of the default, which ends the process."""
