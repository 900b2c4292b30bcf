"""The benchmark of one GPU, on a tiny model and a CPU: that both sides run and what is reported of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_step
from tests.distributed import run_distributed

RESULTS = Path(__file__).parents[2] / "benchmarks/results/gpu_step.json"


def both(rank: int, world_size: int) -> dict[str, Any]:
    ragged = gpu_step.TINY[1]
    ours, side = gpu_step.our_row(ragged, "tiny", 1, None)
    theirs = gpu_step.their_row(ragged, "tiny", 1, None, checkpointing=True)
    assert theirs is not None
    table, products = gpu_step.profile(side.step)
    assert "aten::mm" in table
    return gpu_step.report([ours, theirs], None, 1, products, [])


def test_both_sides_of_a_ragged_case() -> None:
    (found,) = run_distributed(both, 1)
    ours, theirs = found["rows"]
    assert 0.05 < found["share_of_products"] < 1 and found["steps"] == 1
    assert (ours["who"], theirs["who"]) == (gpu_step.OURS, gpu_step.HF_SAVING)
    assert ours["images"] == theirs["images"] == "1, 3" and 0 < ours["vision_share"] < 1
    for row in (ours, theirs):
        assert row["tokens_per_s"] == pytest.approx(2 * 2 * 64 / row["step_s"])
        assert row["of_peak"] is None and row["of_ceiling"] is None  # of a CPU
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    assert found["over_best_hf"] == {"64 tokens, 1, 3 images": pytest.approx(ratio)}


def test_the_better_of_two_settings_is_compared() -> None:
    case = {
        "length": 8,
        "images": "1",
        "rows": 1,
        "step_s": 1.0,
        "model_tflops": 1.0,
        "of_peak": 0.5,
        "of_ceiling": 0.6,
    }
    rows = [
        gpu_step.Row(who=who, tokens_per_s=rate, peak_gib=1.0, **case)  # type: ignore[arg-type]
        for who, rate in ((gpu_step.OURS, 30.0), (gpu_step.HF, 20.0), (gpu_step.HF_SAVING, 10.0))
    ]
    assert gpu_step.report(rows, 2e12, 1, 0.5, ["x (1)"])["over_best_hf"] == {"8 tokens, 1 images": 1.5}


def test_the_results_in_the_repository_have_the_form_of_a_report() -> None:
    file = json.loads(RESULTS.read_text())
    assert file.keys() == gpu_step.report([], None, 1, 0.5, []).keys()
    rows = [gpu_step.Row(**row) for row in file["rows"]]
    assert [asdict(row) for row in rows] == file["rows"] and {row.who for row in rows} >= {gpu_step.OURS, gpu_step.HF}
