"""Whole runs whose batch grows: the same at other layouts, and after they go on in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import data as data  # a fixture
from tests.faults.runs import SMALL, data_overrides, lines_of, numbers_of, run

RAMP = [*SMALL, "training.global_batch_size=8", "training.ramp_up={start: 2, increment: 2, rows: 12}"]
ROWS = [2, 2, 4, 6, 8, 8]  # of the steps that begin at rows 0, 2, 4, 8, 14, 22


def ramped(root: Path, data: Path, world_size: int, *overrides: str) -> list[dict[str, Any]]:
    outcome = run(root, [*RAMP, *data_overrides(data), *overrides], world_size)
    assert outcome.codes == [0] * world_size, outcome.logs
    return [line for line in lines_of(root) if "event" not in line]


def test_the_batch_grows_at_every_layout_and_over_a_restart(data: Path, tmp_path: Path) -> None:
    alone = ramped(tmp_path / "alone", data, 1, "training.steps=6")
    assert [line["tokens"] for line in alone] == [128 * rows for rows in ROWS]
    for name, overrides in {"dp2": [], "pp2": ["parallel.pipeline=2"]}.items():
        there = ramped(tmp_path / name, data, 2, "training.steps=6", *overrides)
        for key in ("tokens", "images", "faults"):
            assert [line[key] for line in there] == [line[key] for line in alone]
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in there] == pytest.approx([line[key] for line in alone], rel=1e-4)
    ramped(tmp_path / "again", data, 1, "training.steps=3")  # in the middle
    assert len(ramped(tmp_path / "again", data, 1, "training.steps=6")) == 6
    assert numbers_of(tmp_path / "again") == numbers_of(tmp_path / "alone")
