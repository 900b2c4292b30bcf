"""The numbers of a step that come and go with what was done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_atum.batch import StepData
from megatron_atum.training import step_report
from megatron_atum.training.engine import StepResult
from megatron_atum.training.step_report import Phases, StepReport

HOSTS = ["a", "b", "c", "d"]


class Engine:
    """As much of one as a report asks: two stages of two data-parallel ranks."""

    dtype = torch.float32
    groups = SimpleNamespace(layout=SimpleNamespace(world_size=4, data=2, coordinates=lambda rank: divmod(rank, 2)))
    optimizer = SimpleNamespace(param_groups=[{"default_config": True, "lr": 0.5}])
    optimizer_watch = SimpleNamespace(take=lambda: 0.125)

    def flops(self, tokens: int, images: int) -> tuple[int, int]:
        return 8 * 10**12, 16 * 10**12


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> StepReport:
    def gather(into: list[Any], own: str) -> None:
        into[:] = HOSTS

    monkeypatch.setattr(step_report.dist, "all_gather_object", gather)
    return StepReport(Engine(), "a")  # type: ignore[arg-type]


def result(forward_s: list[float]) -> StepResult:
    per_rank = {"data_s": [0.1, 0.4, 0.2, 0.0], "memory_gib": [1.0, 3.0, 2.0, 1.5], "forward_s": forward_s}
    counters = {"energy_counters": 3.0, "joules": 7.0}  # one device has none
    return StepResult({"loss": 2.0}, 1.0, 0.5, 6, 60, 48, counters, per_rank)


def values(report: StepReport, **phases: float) -> dict[str, Any]:
    batch = SimpleNamespace(input_ids=torch.zeros(4, 8))
    seconds = {"data": 0.5, "forward_backward": 1.0, "update": 0.5, **phases}
    return report.values(3, result([1.0, 1.0, 5.0, 15.0]), StepData([batch]), seconds)  # type: ignore[list-item]


def test_what_was_not_done_is_absent(report: StepReport) -> None:
    found = values(report)
    assert "validation_s" not in found and "joules" not in found and "mfu" not in found
    assert (found["step_s"], found["checkpoint_s"], found["optimizer_s"]) == (2.0, 0.0, 0.125)
    assert (found["data_s"], found["memory_gib"]) == (0.4, 3.0)
    assert found["model_tflops"] == 1.0 and found["executed_tflops"] == 2.0


def test_validation_is_no_part_of_the_step(report: StepReport) -> None:
    found = values(report, validation=30.0, checkpoint=4.0)
    assert (found["validation_s"], found["checkpoint_s"], found["step_s"]) == (30.0, 4.0, 2.0)


def test_the_slowest_is_found_within_its_stage(report: StepReport) -> None:
    found = values(report)
    assert (found["slowest_rank"], found["slowest_host"], found["slowest_over_median"]) == (3, "d", 1.5)


def test_phases_begin_anew_when_they_are_taken() -> None:
    phases = Phases()
    for name in ("data", "data", "validation"):
        with phases.of(name):
            pass
    assert phases.take().keys() == {"data", "validation"}
    assert phases.take() == {}
