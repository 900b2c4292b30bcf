"""Calls a tool as its command line would, in this process."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_atum.checkpoint.command import run_command


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def call(main: Callable[[], None], capsys: pytest.CaptureFixture[str], *options: str | Path) -> Done:
    arguments, handler, code = sys.argv, signal.getsignal(signal.SIGTERM), 0
    sys.argv = ["tool", *map(str, options)]
    try:
        run_command("tool", main)
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    finally:
        sys.argv = arguments
        signal.signal(signal.SIGTERM, handler)
    captured = capsys.readouterr()
    return Done(code, captured.out, captured.err)


def flip(file: Path, place: int = -1) -> None:
    """Change one byte of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
