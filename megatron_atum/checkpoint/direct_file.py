"""A file that is written from start to end, past the page cache where the file system allows it.

A checkpoint is written once and not read soon. Through the page cache each byte would cost a page of memory, which
training and its data need more, and the time to find one; a large file would then reach the disk in one long stall at
the end. Where direct writing is not possible, the file is written in the ordinary way.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

_BLOCK = 4096  # places and sizes of direct writes are multiples of it
_BUFFER_BYTES = 4 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """Raises OSError, as any file does."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._fd, self._direct = os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._fd, self._direct = os.open(path, flags, 0o666), False
        self._buffer = memoryview(mmap.mmap(-1, _BUFFER_BYTES))  # begins at a page, as direct writes must
        self._held = 0

    def write(self, content: bytes | memoryview) -> None:
        left = memoryview(content)
        while left:
            count = min(len(left), _BUFFER_BYTES - self._held)
            self._buffer[self._held : self._held + count] = left[:count]
            self._held += count
            left = left[count:]
            if self._held == _BUFFER_BYTES:
                self._flush()

    def close(self) -> None:
        """Wait until everything is on disk."""
        try:
            self._flush()
            os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        os.close(self._fd)

    def _flush(self) -> None:
        whole = self._held // _BLOCK * _BLOCK if self._direct else 0
        self._write_out(self._buffer[:whole])
        if whole < self._held:  # where the file is direct, this is its end
            self._go_through_cache()
            self._write_out(self._buffer[whole : self._held])
        self._held = 0

    def _write_out(self, left: memoryview) -> None:
        while left:
            try:
                count = os.write(self._fd, left)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._go_through_cache()  # a file system that lets itself be opened so, and no more
                continue
            left = left[count:]
            if count % _BLOCK:
                self._go_through_cache()

    def _go_through_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT)
            self._direct = False
