"""Files written past the page cache hold what was written, whatever the file system takes."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_atum.checkpoint import direct_file
from megatron_atum.checkpoint.direct_file import DirectFile

BUFFER = 4 << 20
SIZES = [0, 1, 4095, 4096, 4097, 100_000, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 4096, 2 * BUFFER + 5000]


def written(path: Path, content: bytes, seed: int = 0) -> bytes:
    """Write in pieces of all sizes, and read it back."""
    chance, place = random.Random(seed), 0
    file = DirectFile(path)
    while place < len(content):
        step = chance.choice([1, 7, 4096, 50_000, 3 << 20])
        file.write(content[place : place + step])
        place += step
    file.close()
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_every_size(size: int, tmp_path: Path) -> None:
    content = random.Random(size).randbytes(size)
    assert written(tmp_path / "file", content, size) == content


@pytest.mark.parametrize("refused", ["open", "write"])
def test_where_direct_writing_is_refused(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, wrote, times = os.open, os.write, []

    def refuse_open(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            times.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *args, **more)

    def refuse_write(fd: int, content: Any) -> int:
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            times.append("write")
            raise OSError(errno.EINVAL, "Invalid argument")
        return wrote(fd, content)

    monkeypatch.setattr(direct_file.os, refused, refuse_open if refused == "open" else refuse_write)
    content = random.Random(1).randbytes(2 * BUFFER + 5000)
    assert written(tmp_path / "file", content) == content
    assert times == [refused]


def test_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrote = os.write
    monkeypatch.setattr(direct_file.os, "write", lambda fd, content: wrote(fd, content[: min(len(content), 123_456)]))
    content = random.Random(2).randbytes(2 * BUFFER + 5000)
    assert written(tmp_path / "file", content) == content


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, content: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "write", full)
    file = DirectFile(tmp_path / "file")
    with pytest.raises(OSError, match="No space left"):
        file.write(bytes(BUFFER + 1))
    file.abandon()


def test_it_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert written(tmp_path / "file", b"short") == b"short"
