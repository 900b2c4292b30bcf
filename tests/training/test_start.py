"""Run folders: one run at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_atum.errors import ConfigError
from megatron_atum.training.start import lock_run_folder

HOLDER = """
import sys
from pathlib import Path
from megatron_atum.training.start import lock_run_folder
lock = lock_run_folder(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_folder_has_one_writer_and_is_free_when_it_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(ConfigError, match="another run is still writing"):
        lock_run_folder(run)
    holder.kill()
    holder.communicate()
    lock_run_folder(run).close()
