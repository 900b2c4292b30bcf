"""One function over many items, spread over processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from megatron_atum.errors import DataError

AHEAD = 4  # items given out per process
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_work: Callable[[Any], Any] | None = None  # of this process, if it is a worker


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    work: Callable[[_Item], _Result], items: Sequence[_Item], workers: int
) -> Iterator[tuple[_Item, _Result]]:
    """Items and results, as they are done.

    Args:
        work: can be pickled. Each process gets it once, so it may keep what it has loaded.
        workers: processes; 0 works in this one.

    Raises:
        DataError: a process died. What `work` raises comes through.
    """
    if workers == 0 or not items:
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("forkserver")
    workers = min(workers, len(items))
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            yield from _hand_out(pool, items, AHEAD * workers)
        except BrokenProcessPool as error:
            raise DataError("a worker died; with too little memory use fewer --workers; start again") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _hand_out(pool: ProcessPoolExecutor, items: Sequence[_Item], ahead: int) -> Iterator[tuple[_Item, Any]]:
    waiting = iter(items)
    running: dict[Future[Any], _Item] = {}
    while True:
        while len(running) < ahead and (item := next(waiting, None)) is not None:
            running[pool.submit(_call, item)] = item
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield running.pop(future), future.result()


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent to the whole group; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """A killed parent cannot end its workers, and they would wait for it forever."""
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    assert _work is not None
    return _work(item)
