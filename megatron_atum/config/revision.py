"""Which code this is."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Beside the package's __init__.py, where the code went without its git checkout: into an image, to SageMaker. One line,
# as `git_state` says it.
REVISION_FILE = "REVISION"


def git_state(file: Path = Path(__file__).parents[1] / "__init__.py") -> str:
    """Commit of the code, and whether it was changed since.

    A package that is installed somewhere inside another repository is not tracked there, and has no commit of that one.

    Args:
        file: of the code; its folder is where REVISION would be.
    """
    folder = file.parent
    try:
        _git(folder, "ls-files", "--error-unmatch", file.name)
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return f"commit {commit}{', with changes' if _git(folder, 'status', '--porcelain', '-uno') else ''}"
    except (OSError, subprocess.SubprocessError):
        return _written(folder) or "no git checkout"


def _written(folder: Path) -> str:
    try:
        return (folder / REVISION_FILE).read_text().strip()
    except OSError:
        return ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
