"""Energy that this process's device uses, from NVIDIA's management library."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from megatron_atum.parallel.device import device, has_accelerator


class EnergyMeter:
    """Reads the device's counter of energy.

    Devices before Volta, parts of a device (MIG), and machines without the library (package nvidia-ml-py) have none;
    `joules` is None there.
    """

    def __init__(self) -> None:
        self._library, self._handle = _find_device()
        self._before = self._read()

    def joules(self) -> float | None:
        """Used since the last call, or since the meter was made; by everything that runs on the device."""
        before, self._before = self._before, self._read()
        if before is None or self._before is None:
            return None
        return (self._before - before) / 1000

    def _read(self) -> int | None:
        """Millijoules since the driver was loaded."""
        if self._handle is None:
            return None
        with contextlib.suppress(self._library.NVMLError):
            return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        return None


def _find_device() -> tuple[Any, Any]:
    """The library and its handle of this process's device; it numbers devices in another order, so by UUID."""
    if not has_accelerator():
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device()).uuid
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (pynvml.NVMLError, AttributeError):  # torch built for other devices knows no UUID
        return None, None
