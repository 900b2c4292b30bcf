"""Environments of their own for tools whose pins do not agree with .venv: made on first use by the command that needs
them, whole or not at all."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import venv
from pathlib import Path

from megatron_atum.errors import ConfigError


def make_environment(folder: Path, requirements: Path) -> Path:
    """A virtual environment with the packages of a requirements file. Another process that makes it is waited for.

    Returns:
        Its Python. It is made anew when the file or this Python is another than the one that it was made with.

    Raises:
        ConfigError: pip cannot install them.
    """
    made_of = f"{sys.version}\n{requirements.read_text()}"
    complete, python = folder / "complete", folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists() or complete.read_text() != made_of:
            _install(folder, python, requirements, lock.fileno())
            complete.write_text(made_of)
    return python


def _install(folder: Path, python: Path, requirements: Path, lock: int) -> None:
    """lock: a file that stays locked until pip has ended, whatever becomes of this process."""
    print(f"making {folder} ...", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=False, clear=True)
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "-r", str(requirements)]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, pass_fds=(lock,))
    if done.returncode:
        raise ConfigError(
            f"pip cannot install {requirements} into {folder}; give pip an index that has these packages\n"
            f"{done.stderr[-2000:]}"
        )
