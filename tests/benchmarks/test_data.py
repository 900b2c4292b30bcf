"""The loader's benchmark, small, without the peer that needs an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_reports_what_it_promises() -> None:
    command = [sys.executable, "benchmarks/data.py", "--images", "150", "--rounds", "1", "--without", "energon"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # No bound that a busy machine could miss; the figures themselves are in docs/performance.md.
    assert 0.1 < found["loader_over_bare_decode"] < 10
    assert 0.1 < found["webdataset_over_bare_decode"] < 10
    assert found["cpu_ms_per_image"] > 0
    assert 0.9 < found["fill"] <= 1
    assert not list((ROOT / "benchmarks").glob("data-*"))
