"""The code of a job: what of the checkout goes along, and runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from sagemaker_job import CODE

from megatron_atum.config.revision import REVISION_FILE, git_state
from megatron_atum.errors import ConfigError

MOST_CODE_BYTES = 100 * 10**6  # every instance fetches and unpacks it; code takes a few megabytes


def pack(root: Path, config: Path, folder: Path) -> None:
    """Copy what goes along. No setup.py: the toolkit would take it for a package to install.

    Args:
        root: the checkout.
        config: a file below it, for which git's opinion does not count.
        folder: to copy to, empty.

    Raises:
        ConfigError: a link, or more than code takes.
    """
    files = sorted({*_code_files(root), config})
    _check_code(root, files)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / file, folder / file)
    package = Path("megatron_atum")
    (folder / package / REVISION_FILE).write_text(git_state(root / package / "__init__.py") + "\n")


def _code_files(root: Path) -> list[Path]:
    """Names below `root` of what CODE names, of a git checkout without what git ignores."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *CODE]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
        found = [root / os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = []
    if root / "pretrain_atum.py" not in found:  # no checkout, or a folder that the one around it ignores
        everything = [path for name in CODE for path in (root / name, *(root / name).rglob("*"))]
        found = [path for path in everything if "__pycache__" not in path.parts]
    # A file that was deleted is still listed by git until it is committed.
    return [path.relative_to(root) for path in found if path.is_symlink() or path.is_file()]


def _check_code(root: Path, files: list[Path]) -> None:
    """Raises ConfigError."""
    sizes: Counter[Path] = Counter()
    for file in files:
        link = next((place for place in (file, *file.parents) if (root / place).is_symlink()), None)
        if link is not None:
            raise ConfigError(f"{root / link} is a link, which does not go along with the job; put what it names there")
        sizes[file.parent] += (root / file).stat().st_size
    ((largest, size),) = sizes.most_common(1)
    if sizes.total() > MOST_CODE_BYTES:
        raise ConfigError(
            f"the code of the job has {sizes.total() / 1e6:.0f} MB and may have {MOST_CODE_BYTES / 1e6:.0f}; "
            f"{root / largest} has {size / 1e6:.0f} of them: keep data elsewhere, or let git ignore them"
        )
