"""What a user can get wrong. Everything else is a bug and may end in a traceback. And how messages are worded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

LARGEST_REASON = 1024  # characters of the file that SageMaker shows as FailureReason


class AtumError(Exception):
    """A mistake the user can mend. Entry points print it as one line and exit with code 2."""


class ConfigError(AtumError):
    """A configuration that cannot run: names the key and a value that would work."""


class DataError(AtumError):
    """Data that cannot be used: names the file and the key, and how to mend it."""


class DataFailure(RuntimeError):
    """Reading data failed for a reason that is neither the data's nor the user's, on some rank: a bug, a machine short
    of memory, a process that was killed. Raised on all ranks; starting again may help."""


class CheckpointError(AtumError):
    """A checkpoint or Hugging Face folder that cannot be used: names it and says why."""


class HealthFailure(RuntimeError):
    """Training cannot go on as it is: numbers that are not finite, or weights that changed. Raised on all ranks."""


class RankFailure(RuntimeError):
    """This rank failed, or a collective did because another rank died or hangs. Says which, as far as it is known."""


def first_line(error: BaseException) -> str:
    """What an error says, or what it is if it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def listed(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first ones, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def report_failure(reason: str, environ: Mapping[str, str]) -> None:
    """Leave the reason where SageMaker looks for it, on a host of a job; elsewhere do nothing.

    The toolkit writes the file if there is none, but knows only lines with the name of one of Python's own errors. The
    first rank of a host that fails counts.
    """
    folder = environ.get("SM_OUTPUT_DIR")
    if folder:
        with contextlib.suppress(OSError), (Path(folder) / "failure").open("x") as file:
            file.write(reason[:LARGEST_REASON])
