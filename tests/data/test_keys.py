"""Doubled keys are found with hashes, and told apart from other keys with the same hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_atum.data import keys
from megatron_atum.data.flags import mask_of
from megatron_atum.data.keys import Doubled, find_doubled_keys, key_hashes
from megatron_atum.data.sidecar import Sidecar, sidecar_path
from tests.data.conftest import fake_sidecar


def sidecar_of(*names: str, flags: list[int] | None = None) -> Sidecar:
    sidecar = fake_sidecar("pairs", [3] * len(names), [[1]] * len(names), flags)
    sidecar.arrays["first_key"] = np.cumsum([0, *map(len, names)]).astype(np.uint32)
    sidecar.arrays["keys"] = np.frombuffer("".join(names).encode(), np.uint8)
    return sidecar


def write(folder: Path, *sidecars: Sidecar) -> list[str]:
    paths = [str(folder / f"{number}.tar") for number in range(len(sidecars))]
    for path, sidecar in zip(paths, sidecars, strict=True):
        Path(sidecar_path(path)).write_bytes(sidecar.to_bytes())
    return paths


def test_hashes_differ_with_every_byte_and_length() -> None:
    names = [f"{n:x}" for n in range(50_000)] + [f"{n:017d}" for n in range(50_000)] + ["\0", "\0\0", "\0" * 9]
    hashes = key_hashes(sidecar_of(*names))
    assert len(np.unique(hashes)) == len(names)
    assert key_hashes(sidecar_of("b", "long-key-of-a-shard", "\0\0"))[2] == hashes[-2]


@pytest.mark.parametrize("most", [1, 4, 1 << 28])
def test_what_two_shards_have_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(keys, "MOST_HASHES", most)
    broken = sidecar_of("a", "b", flags=[mask_of(["cut_off"]), 0])
    shards = write(tmp_path, sidecar_of("a", "b", "c-with-a-long-name"), sidecar_of("d", "c-with-a-long-name"), broken)
    found = find_doubled_keys(shards, 7, workers=0)
    assert found.listed == [Doubled("b", [shards[0], shards[2]]), Doubled("c-with-a-long-name", shards[:2])]
    assert found.count == 2


def test_many_are_counted_and_some_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MOST_LISTED", 3)
    shards = write(tmp_path, *[sidecar_of(*"abcdefgh")] * 2)
    found = find_doubled_keys(shards, 16, workers=2)
    assert (found.count, len(found.listed)) == (8, 3)


def test_other_keys_of_the_same_hash_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "key_hashes", lambda sidecar: np.zeros(len(sidecar), np.uint64))
    found = find_doubled_keys(write(tmp_path, sidecar_of("a"), sidecar_of("b")), 2, workers=0)
    assert (found.count, found.listed) == (0, [])
