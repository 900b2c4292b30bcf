"""The benchmark runs and keeps its contract. Its times are not judged here: the machine may be busy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run_computes_what_hugging_face_does() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, "benchmarks/step.py", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert set(report["tokens_per_s_over_hf"]) == {"1", "ragged"}
    assert report["largest_loss_difference"] <= 1e-4
    for name, row in report["tiny"].items():
        assert row["ratio"] > 0, name
        assert 5 < row["loss"] < 8, name  # log(512) = 6.2
    share = report["vision_share_at_32_images"]
    assert set(share) == {"tensor_1", "tensor_2"}
    assert all(0 < value < 1 for value in share.values())
    assert len(report["vision"]["2"]) == 2
    assert {"cpu", "cores", "date", "torch", "device"} <= set(report)
