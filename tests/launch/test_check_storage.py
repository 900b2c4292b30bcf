"""Reading and writing, and what goes wrong with it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_atum.launch import check_storage
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Node
from megatron_atum.launch.check_storage import Moved, read_files, storage_line, write_file

NODES = [Node("a", (0, 1)), Node("b", (2, 3))]


def test_files_are_read(tmp_path: Path) -> None:
    for name in ("x/1.tar", "x/2.tar", "3.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 1000)
    assert read_files(tmp_path, 0, 1500).size == 1500
    assert read_files(tmp_path, 5, 10_000).size == 3000
    one = read_files(tmp_path / "3.tar", 7, 600)
    assert (one.size, one.problem) == (600, "") and one.seconds > 0
    assert "no folder with files" in read_files(tmp_path / "nothing", 0, 1).problem


def test_each_process_begins_with_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        (tmp_path / name).write_bytes(b"0" * 10)
    begun = []
    read = check_storage._read
    monkeypatch.setattr(check_storage, "_read", lambda file, most: (begun.append(file.name), read(file, most))[1])
    for rank in range(4):
        assert read_files(tmp_path, rank, 10).size == 10
    assert begun == ["a", "b", "c", "a"]


@pytest.mark.parametrize("size", [100, check_storage.BLOCK + 5])
def test_a_file_is_written_and_removed(tmp_path: Path, size: int) -> None:
    moved = write_file(tmp_path, 3, size)
    assert (moved.size, moved.problem) == (size, "")
    assert 0 < moved.free_bytes < moved.total_bytes and moved.seconds > 0
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in write_file(tmp_path / "nothing", 0, 10).problem


@pytest.mark.parametrize("damage", [b"0" * 100, b"", b"0" * 99])
def test_other_bytes_than_were_written_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    fsync = os.fsync

    def damaged(number: int) -> None:
        fsync(number)
        os.ftruncate(number, len(damage))
        os.pwrite(number, damage, 0)

    monkeypatch.setattr(os, "fsync", damaged)
    assert "gives back something else" in write_file(tmp_path, 0, 100).problem
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert write_file(tmp_path, 0, 10).problem == "[Errno 28] No space left on device"
    assert list(tmp_path.iterdir()) == []


def moved(*seconds: float, free: int = 500) -> dict[int, Moved]:
    return {rank: Moved(10**9, each, "", free, 1000) for rank, each in enumerate(seconds)}


def test_rates_are_judged(tmp_path: Path) -> None:
    line = storage_line("write", tmp_path, "--checkpoints", moved(1, 1, 1, 1), NODES)
    assert (line.status, line.found) == (OK, "4 GB/s by all together, 2 GB/s at the slowest node, 0 GB free")
    line = storage_line("write", tmp_path, "--checkpoints", moved(1, 1, 1, 1, free=40), NODES)
    assert (line.status, "make room" in line.advice) == (WARNING, True)
    three = [*NODES, Node("c", (4, 5))]
    line = storage_line("write", tmp_path, "--checkpoints", moved(1, 1, 5, 1, 1, 1), three)
    assert (line.status, line.advice) == (WARNING, "b is much slower than the others (2 GB/s in the median)")
    line = storage_line("write", tmp_path, "--checkpoints", {**moved(1, 1, 1), 3: Moved(problem="full")}, NODES)
    assert (line.status, line.found) == (FAILED, "rank 3: full")
    assert storage_line("write", None, "--checkpoints", {}, NODES).status == NOT_CHECKED
    line = storage_line("read", tmp_path, "--data", moved(1, 1), NODES)  # the others have said nothing
    assert line.status == FAILED and "nothing from ranks 2, 3" in line.found
