"""Which steps and ranks are profiled, and what the trace holds."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.config.schema import Config
from megatron_atum.errors import ConfigError
from megatron_atum.training.profiling import ProfileWindow, check_profile


def window(folder: Path, rank: int = 0, **changes: Any) -> tuple[ProfileWindow, list[str]]:
    config, said = Config(), []
    for key, value in ({"profile_start": 3, "profile_steps": 2, "profile_ranks": [0]} | changes).items():
        setattr(config.logging, key, value)
    return ProfileWindow(config.logging, folder, rank, said.append), said


def run_steps(profile: ProfileWindow, steps: Any) -> None:
    for step in steps:
        profile.before_step(step)
        torch.ones(8, 8 + step).mm(torch.ones(8 + step, 4))
        profile.after_step(step)


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def slices(path: Path) -> list[str]:
    return sorted({event["name"] for event in trace(path) if str(event.get("name", "")).startswith("step ")})


def test_the_trace_holds_the_steps_of_the_window(tmp_path: Path) -> None:
    profile, said = window(tmp_path)
    run_steps(profile, range(1, 8))
    (path,) = tmp_path.rglob("*.*")
    assert path == tmp_path / "profile" / "rank-00000-steps-3-4.json.gz"
    assert len(said) == 1 and str(path) in said[0]
    assert slices(path) == ["step 3", "step 4"]
    products = [event for event in trace(path) if event.get("name") == "aten::mm"]
    assert sorted(event["args"]["Input Dims"][0] for event in products) == [[8, 11], [8, 12]]
    assert all(event["ph"] == "X" and event["dur"] > 0 for event in products)


@pytest.mark.parametrize("changes", [{"rank": 1}, {"profile_start": 0}, {"profile_ranks": []}])
def test_elsewhere_nothing_happens(changes: dict[str, Any], tmp_path: Path) -> None:
    profile, said = window(tmp_path, **changes)
    run_steps(profile, range(1, 8))
    profile.close()
    assert said == [] and list(tmp_path.iterdir()) == []


def test_other_ranks_have_files_of_their_own(tmp_path: Path) -> None:
    for rank in (0, 3):
        run_steps(window(tmp_path, rank, profile_ranks=[0, 3])[0], range(1, 8))
    names = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert names == ["rank-00000-steps-3-4.json.gz", "rank-00003-steps-3-4.json.gz"]


@pytest.mark.parametrize(
    ("steps", "name", "seen"),
    [
        ([1, 2, 3, 4], "3-4", ["step 3", "step 4"]),  # the run ends inside the window
        ([4, 5, 6, 7], "4-5", ["step 4", "step 5"]),  # it was resumed inside
        ([1, 2, 3, 4, 2, 3, 4, 5, 6], "3-4", ["step 3", "step 4"]),  # it was rolled back inside
        ([1, 2, 3, 4, 3, 4, 5, 6], "3-4", ["step 3", "step 4"]),
    ],
)
def test_part_of_a_window(steps: list[int], name: str, seen: list[str], tmp_path: Path) -> None:
    profile, _ = window(tmp_path, profile_steps=3)
    run_steps(profile, steps)
    profile.close()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == f"rank-00000-steps-{name}.json.gz"
    assert slices(path) == seen


def test_an_error_inside_a_step_still_gives_a_trace(tmp_path: Path) -> None:
    profile, _ = window(tmp_path)
    profile.before_step(3)
    profile.close()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-00000-steps-3-3.json.gz"]


def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile, said = window(tmp_path)
    run_steps(profile, range(1, 8))
    assert len(said) == 1 and "could not be written" in said[0]


def test_a_full_disk_leaves_no_half_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_atum.training.profiling.shutil.copyfileobj", full)
    profile, said = window(tmp_path)
    run_steps(profile, range(1, 8))
    assert "No space left" in said[0] and list((tmp_path / "profile").iterdir()) == []


def test_a_window_that_the_run_does_not_have() -> None:
    config = Config()
    config.training.steps = 10
    check_profile(config, 1)
    config.logging.profile_start, config.logging.profile_ranks = 10, [0, 3]
    check_profile(config, 4)
    with pytest.raises(ConfigError, match=r"profile_ranks=\[0, 3\].*0 to 2"):
        check_profile(config, 3)
    config.logging.profile_start = 11
    with pytest.raises(ConfigError, match=r"profile_start=11.*training.steps=10"):
        check_profile(config, 4)
