"""Five optimizer steps give the same losses, gradient norms and parameters at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.layouts import LAYOUTS, ONE, Degrees
from tests.model.cases import Case, reference
from tests.model.parity import ZERO_GRADIENT
from tests.training.equivalence import train

UNFROZEN = Case("unfrozen", 21, layers=2, interval=1, rows=1, images=((2,), (0,), (1,), (3,)), small_norm_inputs=False)
FROZEN = Case(
    "frozen", 22, rows=1, images=((1,), (2,), (0,), (1,)), frozen=True, alpha_type="vector", small_norm_inputs=False
)

DATA_PARALLEL = [
    Degrees(data=2),
    Degrees(data=2, tensor=2),
    Degrees(data=2, tensor=2, sequence=True),
    Degrees(data=2, pipeline=2),
]
PLAIN = {"distributed": False, "overlap_grad_reduce": False}
SHARDED = {"distributed": True, "overlap_grad_reduce": True}
GATHERED = {**SHARDED, "overlap_param_gather": True, "bucket_size": 2000}  # many buckets


@pytest.fixture(scope="module", params=[UNFROZEN, FROZEN], ids=lambda case: case.name)
def trained_alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A case on disk, and its five steps in one process without any sharding."""
    path = tmp_path_factory.mktemp("steps") / "expected.pt"
    torch.save(reference(request.param), path)
    return path, run_distributed(train, 1, [(ONE, PLAIN)], str(path))[0][0]


def check_equal(ours: dict[str, Any], alone: dict[str, Any], name: str) -> None:
    for step, (losses, expected) in enumerate(zip(ours["losses"], alone["losses"], strict=True)):
        assert losses.keys() == expected.keys()
        for key in losses:
            assert losses[key] == pytest.approx(expected[key], rel=1e-6), f"{name}: {key} of step {step}"
    assert ours["grad_norms"] == pytest.approx(alone["grad_norms"], rel=1e-6), name
    assert ours["parameters"].keys() == alone["parameters"].keys()
    for key, value in ours["parameters"].items():
        worst = float((value - alone["parameters"][key]).abs().max())
        assert worst <= 1e-6, f"{name}: {key} differs by {worst}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_equal_one_process(world_size: int, trained_alone: tuple[Path, Any]) -> None:
    path, alone = trained_alone
    layouts = [degrees for degrees in LAYOUTS + DATA_PARALLEL if degrees.world_size == world_size]
    jobs = [(degrees, changes) for degrees in layouts for changes in (PLAIN, SHARDED)]
    jobs += [(degrees, GATHERED) for degrees in layouts if degrees.data > 1]
    results = run_distributed(train, world_size, jobs, str(path), timeout=400)
    for number, (degrees, changes) in enumerate(jobs):
        check_equal(results[0][number], alone, f"{degrees} {changes}")


def test_training_moves_every_tensor(trained_alone: tuple[Path, Any]) -> None:
    """Otherwise equal parameters would prove nothing."""
    path, alone = trained_alone
    start = torch.load(path, weights_only=False).state
    still = {name for name, value in alone["parameters"].items() if torch.equal(value, start[name])}
    assert not {name for name in still if not ZERO_GRADIENT.search(name)}
    assert alone["losses"][0]["loss"] != alone["losses"][-1]["loss"]


def test_buffers_hold_trainable_parameters_only(trained_alone: tuple[Path, Any]) -> None:
    _, alone = trained_alone
    assert alone["buffered"] == alone["trained"]
