"""Seconds that the device spends on parts of the program, without waiting for it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_atum.parallel.device import has_accelerator


class Stopwatch:
    """Adds up the time of the blocks run under `running`."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._pairs: list[tuple[Any, Any]] = []  # events of blocks that the device may not have reached yet

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        if has_accelerator():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._pairs.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds of the blocks since the last call that the device is through with; others count next time."""
        later = []
        for begin, end in self._pairs:
            if end.query():
                self._seconds += begin.elapsed_time(end) / 1000
            else:
                later.append((begin, end))
        self._pairs = later
        seconds, self._seconds = self._seconds, 0.0
        return seconds
