"""The energy counter, with a library that answers as NVIDIA's does; and on a device where there is one."""

from __future__ import annotations

import sys
import time
import types
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from megatron_atum.parallel import power
from megatron_atum.parallel.power import EnergyMeter

UUID = "1b2c3d4e-0000-1111-2222-333344445555"


class Library(types.ModuleType):
    """pynvml with one device."""

    class NVMLError(Exception):
        pass

    def __init__(self, readings: list[int | None]) -> None:
        super().__init__("pynvml")
        self.readings = readings  # None: not supported

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise self.NVMLError(uuid)
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        reading = self.readings.pop(0)
        if reading is None:
            raise self.NVMLError("Not Supported")
        return reading


@pytest.fixture
def with_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a library in place."""

    def place(library: Any, uuid: str = UUID) -> None:
        monkeypatch.setattr(power, "has_accelerator", lambda: True)
        monkeypatch.setattr(power, "device", lambda: torch.device("cuda", 1))
        asked = lambda device: types.SimpleNamespace(uuid=uuid) if device.index == 1 else None  # noqa: E731
        monkeypatch.setattr(torch.cuda, "get_device_properties", asked)
        monkeypatch.setitem(sys.modules, "pynvml", library)

    return place


def test_joules_are_those_since_the_last_call(with_device: Any) -> None:
    with_device(Library([5_000, 7_500, 7_500, 8_000]))
    meter = EnergyMeter()
    assert [meter.joules() for _ in range(3)] == [2.5, 0.0, 0.5]


def test_a_reading_that_fails_is_left_out(with_device: Any) -> None:
    with_device(Library([1_000, None, 3_000, 4_000]))
    meter = EnergyMeter()
    assert [meter.joules() for _ in range(3)] == [None, None, 1.0]


def test_without_a_counter(with_device: Any) -> None:
    with_device(Library([None, None]))
    assert EnergyMeter().joules() is None
    with_device(Library([1]), uuid="of a part of a device")
    assert EnergyMeter().joules() is None
    with_device(None)  # the package is not installed
    assert EnergyMeter().joules() is None


def test_without_a_device() -> None:
    if not torch.cuda.is_available():
        assert EnergyMeter().joules() is None


@pytest.mark.gpu
def test_a_real_device_uses_energy() -> None:
    meter, began = EnergyMeter(), time.monotonic()
    x = torch.ones(4096, 4096, device="cuda")
    while time.monotonic() - began < 1.0:
        x @ x
        torch.cuda.synchronize()
    used = meter.joules()
    if find_spec("pynvml") is None:  # nvidia-ml-py is optional
        assert used is None
    else:
        assert used is not None and 10 < used < 3000
