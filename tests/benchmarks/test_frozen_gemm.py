"""The benchmark runs and keeps its contract, and its text is what it says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import frozen_gemm
from benchmarks.frozen_gemm import FIRST, LENGTH, LIKELY, PAIRS, SUCCESSORS, WAYS, make_batch, successors
from megatron_atum.model.frozen_gemm import FrozenMatrix

ROOT = Path(__file__).parents[2]


def test_quick_run() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also where the package is not installed
    command = [sys.executable, "benchmarks/frozen_gemm.py", "--quick"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    (losses,) = report["runs"]
    assert set(losses) == set(WAYS)
    assert all(len(way["losses"]) == 4 and 1 < way["after"] < 8 for way in losses.values())
    assert set(report["differences"]) == set(PAIRS)
    for row in report["differences"].values():
        assert row["step"][0] > 0, "else both are the same run"
    assert abs(report["differences"]["fp8 - bf16"]["before"][0]) < 0.05
    (exchanged,) = report["exchanged"]
    assert 0 < exchanged["bf16"]["rms"] < exchanged["decoder and vision in fp8"]["rms"] < 0.5
    assert exchanged["bf16"]["rms"] < exchanged["head in fp8"]["rms"] < 0.5
    assert (report["products"] is None) == (not torch.cuda.is_available())
    assert {"cpu", "cores", "date", "torch", "device"} <= set(report)


def test_products_run_before_any_is_timed_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are then those for any size, and no weight stays in a cache."""
    done: list[str] = []
    of, milliseconds = FrozenMatrix.of, frozen_gemm._milliseconds

    def cast(weight: torch.Tensor, group: None) -> FrozenMatrix:
        done.append(f"cast {weight.shape[1]}")
        return of(weight, group)

    def timed(runs: Sequence[frozen_gemm.Run]) -> float:
        done.append(f"timed {len(runs)}")
        return milliseconds(runs, times=2, rounds=1)

    monkeypatch.setattr(FrozenMatrix, "of", cast)
    monkeypatch.setattr(frozen_gemm, "_milliseconds", timed)
    monkeypatch.setattr(frozen_gemm, "SHAPES", {"a": (8, 16, 32, True), "b": (8, 64, 16, False)})
    monkeypatch.setattr(frozen_gemm, "BEYOND_CACHE", 3 * 64 * 16)
    found = frozen_gemm.products()
    assert done[:2] == ["cast 16", "cast 64"], "all shapes before the first time"
    assert done[2:] == ["cast 16"] * 6 + ["timed 6"] * 4 + ["cast 64"] * 3 + ["timed 3"] * 2
    assert found["a"]["fp8 backward ms"] > 0 and "fp8 backward ms" not in found["b"]


def test_the_weights_that_take_turns() -> None:
    """Each of them is another one."""
    for forwards, *_ in frozen_gemm._ways(8, 16, 32, 3).values():
        results = [run() for run in forwards]
        assert len(results) == 3 and not any(torch.equal(results[n], results[n - 1]) for n in range(3))


def test_images_tell_which_successor_is_likely() -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [make_batch(generator, 8) for _ in range(300)]
    table = successors()
    assert all(len(set(row)) == SUCCESSORS for row in table.tolist())
    chosen: Counter[bool] = Counter()
    for batch in batches:
        assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
        assert int(batch.image_index.max()) == 1 and int(batch.image_index[0, LENGTH // 2]) == 1
        shades = batch.pixels.mean((-2, -1))
        colours = torch.where(shades.min(1).values > 0, 3, shades.argmax(1)).view(2, 2)  # white, or red, green, blue
        of_token = colours.gather(1, batch.image_index)
        likely = table[batch.input_ids - FIRST, of_token] == batch.labels - FIRST
        chosen.update(likely.flatten().tolist())
    share = chosen[True] / sum(chosen.values())
    assert share == pytest.approx(LIKELY, abs=0.01)
    assert math.log(SUCCESSORS) == pytest.approx(1.386, abs=1e-3)
    assert -(LIKELY * math.log(LIKELY) + (1 - LIKELY) * math.log(0.1)) == pytest.approx(0.940, abs=1e-3)
