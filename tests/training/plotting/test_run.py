"""What a metrics file says: which steps counted, what was undone, and what is wrong with the file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_atum.errors import DataError
from megatron_atum.training.plotting.run import Run, differences, read_run, smooth


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(texts) + "\n")
    return folder


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, **values}


def event(name: str, number: int, **values: Any) -> dict[str, Any]:
    return {"event": name, "step": number, **values}


def counted(run: Run) -> list[Any]:
    return [line["loss"] for line in run.steps]


def test_curves_leave_out_what_is_missing(tmp_path: Path) -> None:
    run = read_run(
        write(tmp_path, step(1, loss=3.0), step(2, loss=None), step(3, loss=math.nan, lr=1), step(4, loss=1.0))
    )
    assert run.keys == ["step", "loss", "lr"]
    loss, rate = run.curve("loss"), run.curve("lr")
    assert loss.steps.tolist() == [1, 3, 4] and np.array_equal(loss.values, [3.0, np.nan, 1.0], equal_nan=True)
    assert rate.steps.tolist() == [3] and len(run.curve("none")) == 0


def test_a_rollback_undoes_steps_and_validations(tmp_path: Path) -> None:
    lines = [step(number, loss=float(number)) for number in range(1, 7)]
    after = [step(number, loss=10.0 + number) for number in range(4, 9)]
    validations = [event("validation", 2, loss=1.0), event("validation", 6, loss=2.0)]
    rollback = event("rollback", 3, **{"from": 6}, reason="a spike")
    run = read_run(write(tmp_path, *lines, *validations, rollback, *after, event("validation", 6, loss=3.0)))
    assert counted(run) == [1, 2, 3, 14, 15, 16, 17, 18]
    assert [[line["loss"] for line in part] for part in run.abandoned] == [[4, 5, 6]]
    assert [curve.steps.tolist() for curve in run.abandoned_curves("loss")] == [[4, 5, 6]]
    assert run.validation("loss").steps.tolist() == [2, 6]
    assert run.validation("loss").values.tolist() == [1.0, 3.0]


def test_two_rollbacks_and_one_that_was_the_last_line(tmp_path: Path) -> None:
    first = [step(number, loss=float(number)) for number in range(1, 6)]
    second = [step(number, loss=10.0 + number) for number in range(3, 6)]
    back = [event("rollback", 2, **{"from": 5}), *second, event("rollback", 3, **{"from": 5})]
    run = read_run(write(tmp_path, *first, *back))
    assert counted(run) == [1, 2, 13]
    assert [[line["loss"] for line in part] for part in run.abandoned] == [[3, 4, 5], [14, 15]]


def test_a_step_that_comes_again_undoes_without_an_event(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, *(step(n, loss=float(m)) for m, n in enumerate((1, 2, 3, 2, 3, 4)))))
    assert counted(run) == [0, 3, 4, 5] and len(run.abandoned) == 1


def test_a_last_line_that_is_cut_is_left_out_and_said(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, event("start", 0), step(1, loss=1.0), '{"step": 2, "lo'))
    assert counted(run) == [1.0]
    assert any("line 3" in note and "cut" in note for note in run.notes)


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        ([], "line 1 is damaged"),
        ([event("start", 0)], "holds no step"),
        ([step(1, loss=1.0), '{"step": 2, "lo', step(3, loss=1.0)], "line 2 is damaged"),
        (['{"step": 1'], "line 1 is damaged"),
        ([step(1), "[1]", step(2)], "line 2 is damaged"),
        ([step(1), '{"loss": 2}', step(2)], "line 2 is damaged"),
    ],
)
def test_a_damaged_file(lines: list[Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what):
        read_run(write(tmp_path, *lines))


def test_an_empty_file_and_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DataError, match="holds no step"):
        read_run(tmp_path)
    with pytest.raises(DataError, match="no such run"):
        read_run(tmp_path / "nothing")


def test_the_configuration_and_what_differs(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, step(1, loss=1.0)) for name in "ab")
    (a / "config.yaml").write_text("optimizer: {lr: 1.0, warmup_steps: 2}\nmodel: {preset: tiny}\n")
    (b / "config.yaml").write_text("optimizer: {lr: 2.0, warmup_steps: 2}\n")
    runs = [read_run(a), read_run(b / "metrics.jsonl")]
    assert [run.name for run in runs] == ["a", "b"]
    assert differences(runs) == {"optimizer.lr": [1.0, 2.0], "model.preset": ["tiny", None]}
    (b / "config.yaml").write_text("optimizer: [")
    assert read_run(b).config == {} and any("config.yaml" in note for note in read_run(b).notes)


def test_the_running_mean() -> None:
    values = np.array([4.0, 1.0, 1.0, np.nan, 3.0, 3.0])
    assert np.array_equal(smooth(values, 1), values, equal_nan=True)
    assert smooth(values, 3).tolist() == pytest.approx([4.0, 2.0, 1.0, 2.0, 3.0, 3.0])
    assert smooth(values, 5)[2:].tolist() == pytest.approx([9 / 4, 2.0, 7 / 3, 3.0])
    assert np.isnan(smooth(np.array([np.nan] * 3), 3)).all()
