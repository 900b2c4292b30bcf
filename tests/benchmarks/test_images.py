"""The benchmark runs and keeps its contract. Its times are not judged here: the machine may be busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run_ends_with_one_json_object() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, "benchmarks/images.py", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    rows = {(row["image"], row["path"]): row for row in report["rows"]}
    assert set(rows) == {(image, path) for image in ("small", "large") for path in ("stock", "draft")}
    assert all(row["cpu_ms"] > 0 and row["decode_ms"] > 0 and row["kb"] > 5 for row in rows.values())
    assert rows["large", "stock"]["max_difference"] == rows["small", "draft"]["max_difference"] == 0
    assert 0 < rows["large", "draft"]["max_difference"] <= 5
    assert 0 < rows["large", "draft"]["mean_difference"] < 0.5
    assert report["normalise_ms"] > 0
