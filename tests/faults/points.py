"""Where a process can die: operations of a run that are counted, in a child process only.

Every point has a name that says what is about to happen, such as `commit: rename step-N` or `step: backward is over`.
An uninterrupted run counts how often each is passed; a run that is to be killed dies at the n-th time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

GROUPS = ("files", "commit", "removal", "save", "step")  # of points, by the start of their name

# Audit events of the interpreter: the place of the path among the arguments, and of the folder it is relative to.
_EVENTS = {
    "open": (0, None),
    "os.mkdir": (0, 2),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.link": (1, 3),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Kill:
    """Die when this rank passes a point for the n-th time."""

    rank: int
    point: str
    time: int


class Points:
    """Counts the points that this process passes. `kill` is of this rank, or None."""

    def __init__(self, folder: Path, checkpoints: Path, kill: Kill | None) -> None:
        self.folder, self.kill = folder, kill
        self._prefix = str(checkpoints) + "/"
        self.counts: Counter[str] = Counter()
        self.order: list[str] = []
        self._lock = threading.RLock()
        self._phase = threading.local()
        self._dying = False

    def passed(self, name: str) -> None:
        with self._lock:
            if self._dying:
                return
            self.counts[name] += 1
            self.order.append(name)
            kill = self.kill
            if kill is not None and kill.point == name and kill.time == self.counts[name]:
                self._dying = True
                write_death(self.folder, Path(self._prefix), name)
                os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait()  # the signal may take a moment

    def at_file(self, what: str, path: str) -> None:
        """A point at an operation on a file of the checkpoints."""
        if (path + "/").startswith(self._prefix):
            place = re.sub(r"\.[0-9a-f]{8}\.", ".H.", (path + "/").removeprefix(self._prefix))
            place = re.sub(r"[0-9a-f]{16}", "H", re.sub(r"\d{8}", "N", place))
            self.passed(f"{getattr(self._phase, 'name', 'files')}: {what} {place.rstrip('/') or '.'}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What this thread does to files counts as part of this."""
        before = getattr(self._phase, "name", "files")
        self._phase.name = name
        try:
            yield
        finally:
            self._phase.name = before

    def around(self, owner: Any, name: str, point: str, phase: str | None = None) -> None:
        """Points before and after each call of a function."""
        inner: Callable[..., Any] = getattr(owner, name)

        @wraps(inner)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.passed(f"{point} begins")
            with self.phase(phase or str(getattr(self._phase, "name", "files"))):
                result = inner(*args, **kwargs)
            self.passed(f"{point} is over")
            return result

        setattr(owner, name, counted)

    def watch_files(self) -> None:
        """Points before the interpreter opens for writing, makes, renames, links or removes."""

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event not in _EVENTS or (event == "open" and not args[2] & _WRITES):
                return
            place, relative_to = _EVENTS[event]
            path, folder = args[place], args[relative_to] if relative_to is not None else -1
            if isinstance(path, int):
                return
            path = os.fsdecode(path)
            if folder not in (-1, None):
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
            self.at_file(event.removeprefix("os."), path)

        sys.addaudithook(hook)
        fsync = os.fsync

        def counted(handle: int) -> None:
            self.at_file("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            fsync(handle)

        os.fsync = counted  # type: ignore


def write_death(folder: Path, checkpoints: Path, point: str) -> None:
    """What was there when the process died, for the test."""
    there = sorted(os.listdir(checkpoints)) if checkpoints.is_dir() else []
    (folder / "death.json").write_text(json.dumps({"point": point, "there": there}))


def install(points: Points) -> None:
    """Count what a run of pretrain_atum.py does. This process is used for nothing else."""
    from megatron_atum.checkpoint import run_checkpoint, tensor_file
    from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint
    from megatron_atum.training import metrics, run_log, trainer
    from megatron_atum.training.engine import Engine

    points.watch_files()
    _count_halves(points, tensor_file.TensorFileWriter, metrics.MetricsFile)
    points.around(RunCheckpoint, "_start", "save: copying")
    points.around(run_checkpoint.Staging, "copy", "save: staging")
    # The library's own class starts threads elsewhere too.
    run_checkpoint.Thread = type("Thread", (threading.Thread,), {})  # type: ignore
    points.around(run_checkpoint.Thread, "start", "save: thread's start")
    points.around(RunCheckpoint, "_write_files", "save: writing")
    points.around(RunCheckpoint, "_finish", "save: finishing")
    points.around(run_checkpoint.dist, "gather_object", "save: gathering")
    points.around(RunCheckpoint, "_commit", "commit: all", phase="commit")
    for name in ("write_state", "add_assets", "complete", "complete_frozen", "commit_folder"):
        points.around(run_checkpoint, name, f"commit: {name}")
    points.around(run_checkpoint, "retire_old", "removal: retiring", phase="removal")
    points.around(run_checkpoint, "remove", "removal: removing", phase="removal")
    points.around(trainer.Trainer, "_fill_weights", "start: filling")
    points.around(RunCheckpoint, "clean", "start: cleaning", phase="start")
    points.around(RunCheckpoint, "load", "start: loading")
    points.around(metrics.MetricsFile, "resume_after", "start: cutting the metrics")
    points.around(Engine, "forward_backward", "step: backward")
    points.around(Engine, "compute", "step: gradients")
    points.around(Engine, "apply", "step: update")
    points.around(run_log.RunLog, "step", "step: logging")
    points.around(trainer.Trainer, "_tell", "save: telling")


def hold_up_saves(rank: int) -> None:
    """A save beside the training writes nothing before the next step is over, as that of a large model may."""
    from megatron_atum.checkpoint.run_checkpoint import RunCheckpoint
    from megatron_atum.training.engine import Engine

    moved = threading.Event()
    write, wait, step, start = RunCheckpoint._write_files, RunCheckpoint.wait, Engine.apply, RunCheckpoint._start

    def starting(self: Any, *args: Any) -> Any:
        moved.clear()
        return start(self, *args)

    def stepping(self: Any, result: Any) -> None:
        step(self, result)
        moved.set()

    def waiting(self: Any) -> Any:  # there may be no next step
        moved.set()
        return wait(self)

    def writing(self: Any, job: Any) -> Any:
        moved.wait()
        return write(self, job)

    RunCheckpoint._start, RunCheckpoint._write_files = starting, writing  # type: ignore
    RunCheckpoint.wait, Engine.apply = waiting, stepping  # type: ignore


def _count_halves(points: Points, writer: Any, metrics: Any) -> None:
    """Points at which a file, or a line of the metrics, is half written."""
    put, write = writer._put, metrics.write

    def put_halves(self: Any, content: Any) -> None:
        whole = memoryview(content)
        put(self, whole[: len(whole) // 2])
        points.at_file("middle of", str(self.path))
        put(self, whole[len(whole) // 2 :])

    def write_halves(self: Any, **values: Any) -> None:
        kill = points.kill
        if kill is not None and kill.point == "step: half a line" and kill.time == points.counts[kill.point] + 1:
            with self.path.open("a") as file:
                file.write(json.dumps(values)[:-5])
        points.passed("step: half a line")
        write(self, **values)

    writer._put, metrics.write = put_halves, write_halves
