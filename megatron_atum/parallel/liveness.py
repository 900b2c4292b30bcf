"""Who fell out, when a run stands still or a collective fails: said through the store, which needs no other rank.

A rank that dies or hangs makes the collectives of the others fail, at once (gloo) or at their timeout (NCCL, whose
watchdog then ends the process from outside Python), and what they say names a socket. So a thread of each rank notes
in the store that its process lives and where it is, looks after the next rank, and watches that the training thread
gets on. What fails says so there, and why: ranks that say nothing, and those whose trouble is their own, are the ones
to look at.
"""

from __future__ import annotations

import datetime
import faulthandler
import linecache
import os
import re
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron_atum.errors import first_line, listed, report_failure

DATA_THREAD = "data"  # its name begins with it
POLL_S = 2.0  # between notes that the process lives
DEAD_S = 30.0  # without one
ALARM_S = 8.0  # from another rank's failure to the end of this one, if its own collectives do not fail before
REPORTS_S = 3.0  # how long a failing rank waits for the others to say something as well
_ANSWER_S = 5.0  # of the store
_EARLY, _LATE, _LATE_S = 0.9, 1.1, 3.0  # of the timeout: say it before NCCL's watchdog acts; act after collectives fail
_OTHERS = "waits for others"
_OVER = "over"
# How a rank's error reads when another rank is gone or does not answer.
_OF_OTHERS = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out|Broken pipe|monitoredBarrier")
# A line of code in which a rank waits for others, or for a device that waits for them.
_WAITING = re.compile(
    r"\.(tolist|item|wait|synchronize|result)\(|float\(|bool\(|all_reduce|all_gather|barrier|broadcast"
)


class Liveness:
    """Notes of this rank, and what it can find out about the others."""

    def __init__(self, timeout_s: float, key: str) -> None:
        """
        Args:
            timeout_s: longest time without progress.
            key: that sets it, for messages.
        """
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.host = socket.gethostname()
        self.step = 0
        default: Any = dist.distributed_c10d._get_default_store()
        self._store = default.clone()  # the training thread may be waiting in its own
        self._store.set_timeout(datetime.timedelta(seconds=_ANSWER_S))
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._notes = 0
        self._said_still = False
        self._neighbour = ((self.rank + 1) % self.size, "", time.monotonic())  # rank, its last note, and since when
        self.set_timeout(timeout_s, key)
        self.at(0)
        self._note()
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()

    # What the training thread says ------------------------------------------------------------------------------------

    def at(self, step: int) -> None:
        """This rank has finished so many steps."""
        self.step = step
        self._store.set(f"atum/at/{self.rank}", f"step {step}, host {self.host}, process {os.getpid()}")
        self.beat()

    def beat(self) -> None:
        """This rank gets on."""
        self._beat_at = time.monotonic()

    def set_timeout(self, timeout_s: float, key: str) -> None:
        self._timeout_s, self._key = timeout_s, key
        self.beat()

    def stop(self) -> None:
        """Nothing is expected of this rank from here on."""
        self._over.set()
        self._quietly(f"atum/lives/{self.rank}", _OVER)

    def failed(self, error: BaseException) -> None:
        """This rank ends with an error that says all by itself."""
        self._over.set()
        self._quietly(f"atum/failed/{self.rank}", first_line(error))
        self._quietly("atum/alarm", str(self.rank))

    def last_words(self, error: BaseException) -> str:
        """What to say of an error that others may have caused. No collective."""
        self._over.set()
        self._quietly("atum/alarm", str(self.rank))
        first = first_line(error)
        return self._report("failed", f"failed after step {self.step}: {first}", _OTHERS if of_others(error) else first)

    # What the watching thread does ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(min(POLL_S, self._timeout_s / 8)):
            try:
                self._note()
                self._look_after_neighbour()
                if self._store.check(["atum/alarm"]):
                    self._follow_alarm()
            except Exception:  # the store went with the process that keeps it; collectives tell the rest
                self._over.wait(ALARM_S)
            self._look_at_progress()

    def _note(self) -> None:
        self._notes += 1
        self._store.set(f"atum/lives/{self.rank}", str(self._notes))

    def _look_after_neighbour(self) -> None:
        rank, last, since = self._neighbour
        key = f"atum/lives/{rank}"
        note = self._store.get(key).decode() if self._store.check([key]) else ""
        if note != last or note == _OVER:
            self._neighbour = (rank, note, time.monotonic())
        elif time.monotonic() - since > DEAD_S and rank != self.rank:
            self._raise_alarm_for(rank)

    def _raise_alarm_for(self, rank: int) -> None:
        key = f"atum/failed/{rank}"
        if not self._store.check([key]):  # it may have said why itself
            self._store.set(key, f"has not been heard of for {DEAD_S:.0f} s: its process or node is gone")
        self._store.set("atum/alarm", str(self.rank))

    def _follow_alarm(self) -> None:
        self._store.set(f"atum/failed/{self.rank}", self._why())  # others ask for it now
        if not self._over.wait(ALARM_S):
            self._end("another rank has failed", self._why())

    def _look_at_progress(self) -> None:
        still = time.monotonic() - self._beat_at
        if still > self._timeout_s * _LATE + _LATE_S:
            self._end(f"no progress for {still:.0f} s ({self._key}={self._timeout_s:g})", self._why())
        elif still > self._timeout_s * _EARLY and not self._said_still:
            self._said_still = True
            faulthandler.dump_traceback(all_threads=True)
            what = f"has not got on for {still:.0f} s after step {self.step}, in {self._place()}"
            _print(self._report("still", what, self._why()))
        elif still < self._timeout_s * _EARLY and self._said_still:
            self._said_still = False
            self._quietly(f"atum/still/{self.rank}", _OTHERS)

    def _end(self, what: str, why: str) -> None:
        """End this process, whatever its training thread waits for."""
        what = f"failed after step {self.step}: {what}, in {self._place()}"
        self._quietly("atum/alarm", str(self.rank))
        said = self._report("failed", what, why)
        _print(said)
        report_failure(f"RankFailure: {said}", os.environ)
        _leave()

    def _why(self) -> str:
        frames = self._frames()
        return _OTHERS if waits(frames) else f"stands still in {self._place()}"

    def _place(self) -> str:
        frames = self._frames()
        return _place(frames[0]) if frames else "no Python code"

    def _frames(self) -> list[FrameType]:
        """Of the training thread, innermost first; or of the thread that reads data, where it waits for that one."""
        everywhere = sys._current_frames()
        frames = [frame for frame, _ in traceback.walk_stack(everywhere.get(self._main))]
        if frames and frames[0].f_code.co_filename == threading.__file__:
            for thread in threading.enumerate():
                if thread.name.startswith(DATA_THREAD) and thread.ident in everywhere:
                    return [frame for frame, _ in traceback.walk_stack(everywhere[thread.ident])]
        return frames

    # What is said -----------------------------------------------------------------------------------------------------

    def _report(self, kind: str, what: str, why: str) -> str:
        """Args: kind: failed | still; why: for the other ranks."""
        mine = f"rank {self.rank} on {self.host} {what}"
        try:
            causes = self._causes(kind, why)
            places = self._values("at", [rank for rank, _ in causes])
        except Exception as problem:  # the store went with the process that keeps it
            return f"{mine}; the other ranks cannot be asked ({type(problem).__name__}: the store is gone)"
        if not causes:
            return mine
        others = [f"rank {rank} ({places.get(rank, 'no step')}) {said}" for rank, said in causes]
        return f"{mine}. Look first at {listed(others, 8, '; ')}"

    def _causes(self, kind: str, why: str) -> list[tuple[int, str]]:
        """Other ranks that are silent, or whose trouble is their own, with what is known of them."""
        self._store.set(f"atum/{kind}/{self.rank}", why)
        deadline = time.monotonic() + REPORTS_S
        while not self._store.check(self._keys(kind, range(self.size))) and time.monotonic() < deadline:
            time.sleep(0.2)
        others = [rank for rank in range(self.size) if rank != self.rank]
        said = self._values(kind, others)
        found = [(rank, said.get(rank, "says nothing: dead, or hanging")) for rank in others]
        return [(rank, text) for rank, text in found if text != _OTHERS]

    def _values(self, kind: str, ranks: list[int]) -> dict[int, str]:
        """What is there. Asks for many at once: there may be thousands of ranks, and one store."""
        if not ranks:
            return {}
        keys = self._keys(kind, ranks)
        if self._store.check(keys):
            values = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)
            return {rank: value.decode() for rank, value in zip(ranks, values, strict=True)}
        if len(ranks) == 1:
            return {}
        half = len(ranks) // 2
        return self._values(kind, ranks[:half]) | self._values(kind, ranks[half:])

    @staticmethod
    def _keys(kind: str, ranks: range | list[int]) -> list[str]:
        return [f"atum/{kind}/{rank}" for rank in ranks]

    def _quietly(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except Exception:  # the store is gone, and so are the others
            return


def of_others(error: BaseException) -> bool:
    """Whether an error is how another rank's failure shows here."""
    if isinstance(error, torch.OutOfMemoryError | AssertionError):
        return False
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_OF_OTHERS.search(str(error)))
    )


def waits(frames: list[FrameType]) -> bool:
    """Whether a thread waits for other ranks, as far as its stack tells. Innermost frame first."""
    if any(f"torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename for frame in frames):
        return True
    return bool(frames) and bool(_WAITING.search(linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno)))


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _leave() -> None:
    os._exit(1)
