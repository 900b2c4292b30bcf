"""Who fell out, when a run stands still or a collective fails: said through the store, which needs no other rank.

A rank that dies or hangs makes the collectives of the others fail, at once or at their timeout, and their errors name
a socket. So each rank notes in the store where it is, and when it fails, why: ranks that say nothing, and those whose
trouble is their own, are the ones to look at. A thread watches that the training thread gets on, because not every
wait ends by itself (gloo's point-to-point transfers keep the timeout that their group was made with).
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from types import FrameType

import torch.distributed as dist

DATA_THREAD = "data"  # its name begins with it
REPORTS_S = 3.0  # how long a failing rank waits for the others to fail as well
_ANSWER_S = 5.0  # of the store
_LATER = 1.1  # the watch acts after the timeout of collectives, whose error says more
_LATER_S = 3.0
_OTHERS = "waits for others"


class Liveness:
    """Notes of this rank, and what it can find out about the others."""

    def __init__(self, timeout_s: float) -> None:
        """Args: timeout_s: of collectives."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.host = socket.gethostname()
        self.step = 0
        self._store = dist.distributed_c10d._get_default_store()
        self._main = threading.get_ident()
        self._over = threading.Event()
        self.set_timeout(timeout_s)
        self.at(0)
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()

    def at(self, step: int) -> None:
        """This rank has finished so many steps."""
        self.step = step
        self._store.set(f"atum/at/{self.rank}", f"step {step}, host {self.host}, process {os.getpid()}")
        self.beat()

    def beat(self) -> None:
        """This rank gets on."""
        self._beat_at = time.monotonic()

    def set_timeout(self, timeout_s: float) -> None:
        self._limit_s = timeout_s * _LATER + _LATER_S
        self.beat()

    def stop(self) -> None:
        """Nothing is expected of this rank from here on."""
        self._over.set()

    def last_words(self, error: BaseException) -> str:
        """What to say of an error that others may have caused. No collective."""
        self.stop()
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        return self._report(first, _OTHERS if _waits(frames) else first)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._limit_s / 4)):
            still = time.monotonic() - self._beat_at
            if still > self._limit_s:
                self._give_up(still)

    def _give_up(self, still_s: float) -> None:
        """End this process from its watching thread."""
        faulthandler.dump_traceback(all_threads=True)
        frames = self._frames()
        where = _place(frames[0]) if frames else "nowhere"
        why = _OTHERS if _waits(frames) else f"stands still in {where}"
        print(self._report(f"no progress for {still_s:.0f} s, in {where}", why), file=sys.stderr, flush=True)
        os._exit(1)

    def _frames(self) -> list[FrameType]:
        """Of the training thread, innermost first; or of the thread that reads data, where it waits for that one."""
        everywhere = sys._current_frames()
        frames = [frame for frame, _ in traceback.walk_stack(everywhere.get(self._main))]
        if frames and frames[0].f_code.co_filename == threading.__file__:
            for thread in threading.enumerate():
                if thread.name.startswith(DATA_THREAD) and thread.ident in everywhere:
                    return [frame for frame, _ in traceback.walk_stack(everywhere[thread.ident])]
        return frames

    def _report(self, what: str, why: str) -> str:
        """Args: why: for the other ranks."""
        mine = f"rank {self.rank} on {self.host} failed after step {self.step}: {what}"
        try:
            others = [f"rank {rank} ({self._where(rank)}) {said}" for rank, said in self._causes(why)]
        except Exception as problem:  # the store went with the process that keeps it
            return f"{mine}; the other ranks cannot be asked ({type(problem).__name__}: the store is gone)"
        if not others:
            return mine
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        return f"{mine}. Look first at {'; '.join(others[:8])}{more}"

    def _causes(self, why: str) -> list[tuple[int, str]]:
        """Other ranks that are silent, or whose trouble is their own, with what is known of them."""
        store = self._store
        store.set_timeout(datetime.timedelta(seconds=_ANSWER_S))
        store.set(f"atum/failed/{self.rank}", why)
        deadline = time.monotonic() + REPORTS_S
        while any(not store.check([f"atum/failed/{rank}"]) for rank in range(self.size)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
        said = {rank: self._said(rank) for rank in range(self.size) if rank != self.rank}
        return [(rank, text) for rank, text in said.items() if text != _OTHERS]

    def _said(self, rank: int) -> str:
        key = f"atum/failed/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "says nothing: dead, or hanging"

    def _where(self, rank: int) -> str:
        key = f"atum/at/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "no step"


def _waits(frames: list[FrameType]) -> bool:
    """Whether a thread is, or was, in a collective. Some are waited for in megatron-core's own code."""
    files = [frame.f_code.co_filename for frame in frames]
    communicates = any(f"torch{os.sep}distributed{os.sep}" in file for file in files)
    return communicates or (
        bool(files) and any(f"megatron{os.sep}core{os.sep}" in file for file in (files[0], files[-1]))
    )


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
