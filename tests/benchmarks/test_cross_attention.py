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
    command = [sys.executable, "benchmarks/cross_attention.py", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert {"core_segment_64_over_1", "core_dense_over_segment_at_64", "rows", "cpu", "cores", "date", "torch"} <= set(
        report
    )
    assert [row["images"] for row in report["rows"]] == [1, 64]
    assert all(row[key] > 0 for row in report["rows"] for key in ("segment_ms", "dense_ms", "kv_ms"))
    few, many = report["rows"]
    assert report["core_segment_64_over_1"] == round(many["segment_ms"] / few["segment_ms"], 3)
    assert report["core_dense_over_segment_at_64"] == round(many["dense_ms"] / many["segment_ms"], 3)
    assert report["max_abs_difference"] <= 1e-5
