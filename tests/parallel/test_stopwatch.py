"""Time of the process on a CPU; of the device's own events, and only those it is through with, elsewhere."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from megatron_atum.parallel import stopwatch
from megatron_atum.parallel.stopwatch import Stopwatch


class Device:
    """A queue of work that takes time only as `reach` says."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def reach(self, *milliseconds: float) -> None:
        """The next events are over, at these times."""
        waiting = [event for event in self.events if event.at is None]
        for event, at in zip(waiting, milliseconds, strict=False):
            event.at = at


class Event:
    """As torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at: float | None = None

    def record(self) -> None:
        self.device.events.append(self)

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None and end.at is not None, "torch raises where an event is not over"
        return end.at - self.at


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    def event(enable_timing: bool = False) -> Event:
        assert enable_timing
        return Event(device)

    monkeypatch.setattr(stopwatch, "has_accelerator", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", event)
    return device


def blocks(watch: Stopwatch, count: int) -> None:
    for _ in range(count):
        with watch.running():
            pass


def test_the_time_of_blocks_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 10.0, 12.0, 20.0, 20.25])
    monkeypatch.setattr(stopwatch, "has_accelerator", lambda: False)
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    blocks(watch, 2)
    assert watch.take() == 2.5
    blocks(watch, 1)
    assert watch.take() == 0.25 and watch.take() == 0.0


def test_a_device_is_timed_by_its_own_events(device: Device) -> None:
    watch = Stopwatch()
    blocks(watch, 2)
    device.reach(100.0, 350.0, 1000.0, 1500.0)
    assert watch.take() == pytest.approx(0.75)
    assert watch.take() == 0.0


def test_what_the_device_has_not_reached_counts_next_time(device: Device) -> None:
    watch = Stopwatch()
    blocks(watch, 3)
    device.reach(0.0, 200.0, 300.0)  # in the middle of the second block
    assert watch.take() == pytest.approx(0.2)
    assert watch.take() == 0.0
    device.reach(700.0, 1000.0, 1100.0)
    blocks(watch, 1)
    assert watch.take() == pytest.approx(0.4 + 0.1)
    device.reach(2000.0, 2050.0)
    assert watch.take() == pytest.approx(0.05)


@pytest.mark.gpu
def test_a_real_device() -> None:
    watch, begun = Stopwatch(), time.perf_counter()
    matrix: Any = torch.randn(4096, 4096, device="cuda")
    with watch.running():
        for _ in range(20):
            matrix = matrix @ matrix
    torch.cuda.synchronize()
    passed = time.perf_counter() - begun
    assert 0.0 < watch.take() <= passed and watch.take() == 0.0
