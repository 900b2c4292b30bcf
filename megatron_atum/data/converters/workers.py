"""Parts spread over processes that end with their parent, and whose death is noticed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from megatron_atum.data.converters.counts import Counts
from megatron_atum.data.converters.parts import Part
from megatron_atum.errors import ConfigError, DataError

Report = Callable[[Counts], None]
Work = Callable[[Part, Report], None]


@dataclass(frozen=True)
class Progress:
    counts: Counts  # of the part so far


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class Failed:
    """The part cannot be converted; the others can."""

    message: str


@dataclass(frozen=True)
class Broken:
    """Nothing more can be converted: a bug, a full disk, a fetcher that raised what it should not."""

    error: Exception
    trace: str


Message = Progress | Done | Failed | Broken
OnMessage = Callable[[Part, Message], None]


def run_parts(work: Work, parts: Sequence[Part], workers: int, on_message: OnMessage) -> None:
    """Calls `work` for each part, in `workers` processes, or in this one when that is 0.

    Args:
        work: can be pickled; a DataError of it fails one part, any other exception ends everything.
        on_message: called in this process as the parts go on.

    Raises:
        DataError: a process died.
    """
    if workers == 0:
        for part in parts:
            _run_one(work, part, lambda message, part=part: _deliver(part, message, on_message))  # type: ignore[misc]
        return
    context = multiprocessing.get_context("forkserver")
    crew = [_Worker(context, work) for _ in range(min(workers, len(parts)))]
    try:
        _hand_out(crew, list(reversed(parts)), on_message)
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """One process and the part it is at."""

    def __init__(self, context: multiprocessing.context.ForkServerContext, work: Work) -> None:
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self.process.start()
        theirs.close()
        self.part: Part | None = None

    def give(self, part: Part | None) -> None:
        self.part = part
        if part is not None:
            self.connection.send(part)

    def receive(self) -> Message:
        try:
            message: Message = self.connection.recv()
            return message
        except (EOFError, OSError) as error:
            self.process.join()
            name = "" if self.part is None else f" at {self.part.path}"
            how = f"a worker died{name} (exit code {self.process.exitcode})"
            raise DataError(f"{how}; with too little memory use fewer --workers; start again to go on") from error

    def end(self) -> None:
        """What it leaves half done is removed when the conversion goes on."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _hand_out(crew: list[_Worker], waiting: list[Part], on_message: OnMessage) -> None:
    for worker in crew:
        worker.give(waiting.pop())
    while busy := {worker.connection: worker for worker in crew if worker.part is not None}:
        for connection in wait(list(busy)):
            assert isinstance(connection, Connection)
            worker = busy[connection]
            message = worker.receive()
            assert worker.part is not None
            _deliver(worker.part, message, on_message)
            if not isinstance(message, Progress):
                worker.give(waiting.pop() if waiting else None)


def _deliver(part: Part, message: Message, on_message: OnMessage) -> None:
    if isinstance(message, Broken):
        if not isinstance(message.error, OSError | ConfigError):
            print(f"at {part.path}:\n{message.trace}", file=sys.stderr)
        raise message.error
    on_message(part, message)


def _serve(connection: Connection, work: Work) -> None:
    """A worker: parts come in, messages go out. Signals to the whole group are for the parent to act on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        _run_one(work, part, connection.send)


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run_one(work: Work, part: Part, send: Callable[[Message], None]) -> None:
    try:
        work(part, lambda counts: send(Progress(counts)))
        message: Message = Done()
    except DataError as error:
        message = Failed(str(error))
    except Exception as error:
        message = Broken(_sendable(error), traceback.format_exc())
    send(message)


def _sendable(error: Exception) -> Exception:
    """What the parent raises. Not every exception survives being pickled."""
    if isinstance(error, ConfigError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return OSError(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")
