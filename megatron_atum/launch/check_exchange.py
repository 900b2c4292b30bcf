"""What the ranks of a check tell rank 0, over torch's store and without collectives: a rank that says nothing does not
keep the others waiting for ever, and is named."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

CLOCK_TRIES = 3


class Exchange:
    """Of one rank. Rank 0 keeps the store, or torchrun's agent does."""

    def __init__(self, rank: int, world_size: int, timeout_s: float, *, is_second: bool = False) -> None:
        """Args: is_second: of this process, for use in another thread.

        Raises:
            RuntimeError: there is no store at MASTER_ADDR:MASTER_PORT, or nobody answers.
        """
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=rank == 0 and not of_agent and not is_second,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"check_cluster/{attempt}", store)

    def second(self) -> Exchange:
        return Exchange(self.rank, self.world_size, self.timeout_s, is_second=True)

    def tell(self, what: str, value: Any) -> None:
        self.store.set(f"{what}/{self.rank}", _written(value))

    def heard(self, what: str, timeout_s: float, ranks: Iterable[int] | None = None) -> dict[int, Any]:
        """What these ranks (all) have told, by rank, without those that have not until the time is over."""
        end = time.monotonic() + timeout_s
        found = {}
        for rank in range(self.world_size) if ranks is None else ranks:
            if self._is_there(f"{what}/{rank}", end - time.monotonic()):
                found[rank] = _read(self.store.get(f"{what}/{rank}"))
        return found

    def announce(self, what: str, value: Any) -> None:
        """To all ranks, by rank 0."""
        self.store.set(what, _written(value))

    def announced(self, what: str, timeout_s: float) -> Any:
        """None: it was not, until the time is over."""
        return _read(self.store.get(what)) if self._is_there(what, timeout_s) else None

    def leave(self, count: int) -> None:
        """Rank 0 stays until so many have left, for a moment: the store ends with it, and they may be reading."""
        gone = self.store.add("left", 1)
        end = time.monotonic() + 10
        while self.rank == 0 and gone < count and time.monotonic() < end:
            time.sleep(0.05)
            gone = self.store.add("left", 0)

    def _is_there(self, key: str, timeout_s: float) -> bool:
        try:
            if timeout_s > 0:
                self.store.wait([key], timedelta(seconds=timeout_s))
            return bool(self.store.check([key]))
        except RuntimeError:  # it did not come, or the store has gone
            return False


def _written(value: Any) -> str:
    return pickle.dumps(value).hex()


def _read(text: bytes) -> Any:
    return pickle.loads(bytes.fromhex(text.decode()))


def clock_offsets(exchange: Exchange, ranks: Iterable[int], timeout_s: float) -> dict[int, tuple[float, float]]:
    """By rank 0: how far the clocks of these ranks' hosts are ahead of its own, and how exactly that is known (s).

    Ranks that do not answer are missing, and those that are asked after the time is over.
    """
    end = time.monotonic() + timeout_s
    found = {}
    for rank in ranks:
        offsets = []
        for number in range(CLOCK_TRIES):
            began = time.time()
            exchange.announce(f"clock/{rank}/{number}", True)
            theirs = exchange.announced(f"time/{rank}/{number}", end - time.monotonic())
            ended = time.time()
            if theirs is None:
                break
            offsets.append((theirs - (began + ended) / 2, (ended - began) / 2))
        if offsets:
            found[rank] = min(offsets, key=lambda x: x[1])
    return found


def tell_time(exchange: Exchange, timeout_s: float) -> None:
    """By the ranks that rank 0 asks."""
    for number in range(CLOCK_TRIES):
        if exchange.announced(f"clock/{exchange.rank}/{number}", timeout_s) is None:
            return
        exchange.announce(f"time/{exchange.rank}/{number}", time.time())


class Deadline:
    """Ends a step that takes too long, whatever this process waits for in it."""

    def __init__(self, seconds: float, late: Callable[[str], None]) -> None:
        """Args: late: called in a thread with the step's name; the process ends after it, with exit code 1."""
        self._seconds, self._late = seconds, late
        self._over = threading.Event()
        self.step("start")
        threading.Thread(target=self._watch, name="deadline", daemon=True).start()

    def step(self, name: str) -> None:
        self._step, self._until = name, time.monotonic() + self._seconds

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            if time.monotonic() > self._until:
                try:
                    self._late(self._step)
                finally:
                    os._exit(1)
