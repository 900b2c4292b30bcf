"""What the command-line tools for checkpoints share."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import re
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import torch

from megatron_atum.errors import AtumError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LONG = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def run_command(name: str, main: Callable[[], None]) -> None:
    """Run a tool: a user's mistake is one line on stderr and exit code 2; what is stopped leaves nothing behind."""
    signal.signal(signal.SIGTERM, _stop)
    torch.set_num_threads(1)  # reading and writing have a thread each; a third that spins would be in their way
    _keep_freed_memory()
    try:
        main()
    except (AtumError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped; nothing was written", file=sys.stderr)
        sys.exit(130)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that unfinished folders are removed


def parse_dtype(text: str) -> torch.dtype:
    short = _LONG.get(text, text)
    if short not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[short]


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number, as in transformers."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size


def _keep_freed_memory() -> None:
    """A conversion takes and frees pieces of the same size all the time; to get each anew from the kernel costs more
    than to fill it. glibc only; elsewhere nothing happens."""
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(arena_max, 1)
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 1 << 30)
