"""The benchmark runs and keeps its contract. Its times are not judged here: the machine may be busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, "benchmarks/convert.py", "--folder", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_a_small_run_ends_with_one_json_object(tmp_path: Path) -> None:
    done = run(tmp_path, "--gib", "0.1", "--rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["import_ratio"] > 0 and report["export_ratio"] > 0
    assert report["peak_rss_gib"] <= 2 * report["largest_tensor_gib"] + 1
    assert report["identical"] is True
    assert 0.08 < report["gib"] < 0.12
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(tmp_path: Path) -> None:
    done = run(tmp_path, "--gib", "1e6")
    assert done.returncode != 0 and "GiB free" in done.stderr
    assert list(tmp_path.iterdir()) == []
