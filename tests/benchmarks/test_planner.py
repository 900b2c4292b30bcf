"""The benchmark runs, keeps its contract, and the targets that a small data set and a busy machine can show hold."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_atum.data.sidecar import read_sidecar, sidecar_path
from megatron_atum.data.storage import Storage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planner_benchmark", ROOT / "benchmarks" / "planner.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_run_ends_with_one_json_object(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    options = ["--entries", "2e5", "--packs", "4000", "--folder", str(tmp_path)]
    command = [sys.executable, "benchmarks/planner.py", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["entries"] == pytest.approx(2e5, abs=5)
    assert report["packs_per_s"] > 500 and 0 < report["rss_gib"] < 2
    assert 0 < report["start_s"] < 20 and 0 < report["restore_s"] <= report["restore_all_s"]
    assert report["max_share_error_pct"] < 0.1 and report["state_bytes"] < 2000
    for name in ("obelics", "wikipedia", "laion", "pmd", "all"):
        assert 0.9 < report["fill"][name] <= report["fill_bound"][name] <= 1
        assert report["fill_first_fit"][name] <= report["fill_bound"][name]
    assert report["fill"]["all"] > report["fill_first_fit"]["all"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["wikipedia", "laion"])
def test_its_sidecars_are_those_of_the_index(tmp_path: Path, benchmark: ModuleType, name: str) -> None:
    """Byte for byte; but token ids are zeros that take no room on the disk, and the hash leaves them out."""
    path = str(tmp_path / "0.tar")
    entry = benchmark.write_sidecar(path, name, 500, 300, np.random.default_rng(0))
    sidecar = read_sidecar(sidecar_path(path), Storage())
    written = Path(sidecar_path(path)).read_bytes()
    assert sidecar.to_bytes() == written.replace(entry.index_sha256.encode(), sidecar.digest().encode())
    assert len(sidecar) == entry.samples == 300 and sidecar.key(7) == "000000507"
    assert sidecar.tokens.sum() == len(sidecar.ids) and not sidecar.ids.any()
    assert sidecar.images.sum() == len(sidecar.image_position) == sum(numbers[2] for numbers in entry.usage.values())
    for row in range(300):
        places = sidecar.image_positions(row).astype(int)
        assert (np.diff(places) >= 2).all() and places[0] >= 2 and places[-1] <= sidecar.tokens[row] - 3
    members = [sidecar.text_member(0), *sidecar.image_members(0), sidecar.text_member(1)]
    assert all(one.offset + one.size <= other.offset for one, other in pairwise(members))


def test_means_are_those_of_the_real_sources(benchmark: ModuleType) -> None:
    for name, (_, mean_tokens, _, mean_images) in benchmark.SOURCES.items():
        tokens, images = benchmark.lengths(name, 50_000, np.random.default_rng(1))
        assert tokens.mean() == pytest.approx(mean_tokens, rel=0.05)
        assert images.mean() == pytest.approx(mean_images, rel=0.05)
