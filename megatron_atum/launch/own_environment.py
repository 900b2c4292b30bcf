"""Environments of their own for tools whose pins do not agree with .venv: made on first use by the command that needs
them, whole or not at all."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_atum.errors import ConfigError


def make_environment(
    folder: Path,
    requirements: Path | Sequence[str],
    *,
    shared_site: Path | None = None,
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Path:
    """A virtual environment with packages of its own. Another process that makes it is waited for.

    Args:
        requirements: a file of them, or the words that pip takes for them.
        shared_site: a folder of packages that the environment has too, and pip counts as installed.
        options: of pip install.
        variables: for pip, and the builds that it starts.

    Returns:
        Its Python. It is made anew when the requirements, or this Python, are others than those that it was made with.

    Raises:
        ConfigError: the folder cannot be written, or pip is missing or cannot install them.
    """
    if isinstance(requirements, Path):
        words, content = ["-r", str(requirements)], requirements.read_text()
    else:
        words, content = list(requirements), "\n".join(requirements)
    made_of = "\n".join([sys.version, *([str(shared_site)] if shared_site else []), *options, content])
    complete, python = folder / "complete", folder / "bin" / "python"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists() or complete.read_text() != made_of:
                _make(folder, shared_site)
                _install(folder, python, [*options, *words], variables or {}, lock.fileno())
                complete.write_text(made_of)
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}, an environment of its own: {error}; use a checkout that can be written to"
        ) from None
    return python


def _make(folder: Path, shared_site: Path | None) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(
            f"{sys.executable} has no pip; {folder} is made with it, and {sys.executable} -m ensurepip may install it"
        )
    print(f"making {folder} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=False, clear=True)
    if shared_site is not None:
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "shared.pth").write_text(f"{shared_site}\n")


def _install(folder: Path, python: Path, words: Sequence[str], variables: Mapping[str, str], lock: int) -> None:
    """lock: a file that stays locked until pip has ended, whatever becomes of this process."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *words]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, pass_fds=(lock,))
    if done.returncode:
        raise ConfigError(
            f"pip cannot install {' '.join(words)} into {folder}; give pip an index that has these packages\n"
            f"{done.stderr[-2000:]}"
        )
