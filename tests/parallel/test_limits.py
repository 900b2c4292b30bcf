"""Files that a process may have open, in a process of its own: a hard limit cannot be raised again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import resource, sys
from megatron_atum.errors import ConfigError
from megatron_atum.parallel.limits import allow_connections
soft, hard, ranks = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    allow_connections(ranks)
except ConfigError as error:
    print(error)
else:
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "ranks", "said"),
    [
        (256, 4096, 8, "2176 4096"),
        (256, 4096, 512, "4096 4096"),  # all there is
        (4000, 4096, 1, "4000 4096"),  # enough
        (256, 1024, 512, "this process may have 1024 files open, and 512 ranks need about 2560; raise the hard limit"),
    ],
)
def test_as_many_as_there_are_ranks(soft: int, hard: int, ranks: int, said: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(soft), str(hard), str(ranks)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().startswith(said)
