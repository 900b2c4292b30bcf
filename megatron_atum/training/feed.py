"""The next step's data, fetched and agreed on while the device computes this one.

One thread does it, one step ahead, with a process group of its own. It waits for the workers, learns which images are
broken on any rank, and brings pixels into pinned memory where there is a device to copy them to.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_atum.batch import Batch, StepData
from megatron_atum.data.loader import StepLoader
from megatron_atum.parallel.agreement import largest_codes, together
from megatron_atum.parallel.device import device
from megatron_atum.parallel.groups import ProcessGroups
from megatron_atum.parallel.liveness import DATA_THREAD


@dataclass(frozen=True)
class _Fetched:
    data: StepData
    state: dict[str, Any]  # of the loader after this step
    report: dict[str, dict[str, int]]


class StepFeed:
    """Steps of a loader in order. Collective: every rank asks for the same number of steps."""

    def __init__(self, loader: StepLoader, groups: ProcessGroups, steps: int) -> None:
        """Args: steps: how many will be asked for; none is fetched beyond them."""
        self._loader, self._left = loader, steps
        self._agree = partial(largest_codes, group=groups.host)
        self._pins = device().type != "cpu"
        self._state = loader.state_dict()
        self._report = loader.fault_report()
        if steps > 0:
            together(loader.start)  # processes are made by the main thread
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=DATA_THREAD)
        self._next: Future[_Fetched] | None = None
        self._fetch_next()

    def next(self) -> StepData:
        """Raises DataError or DataFailure, on all ranks."""
        assert self._next is not None
        fetched = self._next.result()
        self._state, self._report = fetched.state, fetched.report
        self._fetch_next()
        return fetched.data

    def more(self, steps: int) -> None:
        """So many more steps will be asked for than were said before."""
        self._left += steps
        if self._next is None:
            self._fetch_next()

    def state_dict(self) -> dict[str, Any]:
        """State after the last step handed out. The same on every rank."""
        return self._state

    def fault_report(self) -> dict[str, dict[str, int]]:
        """Samples dropped and images lost up to the last step handed out, by source and reason."""
        return self._report

    def close(self) -> None:
        """Stops the workers. All steps have been asked for, or the run is at its end for another reason."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._loader.close()

    def _fetch_next(self) -> None:
        if self._left > 0:
            self._next = self._thread.submit(self._fetch)
            self._left -= 1
        else:
            self._next = None

    def _fetch(self) -> _Fetched:
        data = self._loader.next_step(self._agree)
        if self._pins:
            data = replace(data, microbatches=[_pinned(batch) for batch in data.microbatches])
        return _Fetched(data, self._loader.state_dict(), self._loader.fault_report())


def _pinned(batch: Batch) -> Batch:
    tensors: dict[str, Any] = {
        name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, torch.Tensor)
    }
    return replace(batch, **tensors)
