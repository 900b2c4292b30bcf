"""Random numbers that are a pure function of what they are for.

Only the raw 64-bit output of PCG64 is used: numpy guarantees that stream across releases, but not the streams of
`Generator.permutation` or `Generator.uniform`. So a run resumes exactly under a newer numpy too.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


class Random:
    """Independent random numbers for one purpose, e.g. `Random(seed, "crop", pack_id, image_number)`."""

    def __init__(self, *purpose: int | str) -> None:
        # A hash of the text form, so that no two purposes share a stream however long their numbers are.
        digest = hashlib.sha256("/".join(map(str, purpose)).encode()).digest()
        self._bits = np.random.PCG64(int.from_bytes(digest[:16], "little"))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """One float in [low, high)."""
        unit = (int(self._bits.random_raw()) >> 11) * 2.0**-53
        return low + (high - low) * unit

    def uniforms(self, size: int) -> NDArray[np.float64]:
        """[size] floats in [0, 1)."""
        return (self._bits.random_raw(size) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integer(self, end: int) -> int:
        """One integer in [0, end)."""
        return int(self.uniform() * end)

    def permutation(self, size: int) -> NDArray[np.int64]:
        """[size] int64: the numbers 0..size-1 in random order."""
        return np.argsort(self._bits.random_raw(size), kind="stable").astype(np.int64)
