"""Two runs of the same configuration give the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import SMALL, data_overrides, lines_of, make_data, numbers_of, run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("deterministic"))


def say_whether(rank: int) -> None:
    """Whether torch refuses operations that are not deterministic, in the metrics."""
    import torch

    from megatron_atum.training.run_log import RunLog

    step = RunLog.step
    RunLog.step = lambda self, values: step(  # type: ignore[method-assign]
        self, {**values, "deterministic": torch.are_deterministic_algorithms_enabled()}
    )


def test_two_deterministic_runs_are_equal_bit_for_bit(data: Path, tmp_path: Path) -> None:
    changes = ["training.deterministic=true", "parallel.tensor=2", "training.steps=4", "training.precision=bf16"]
    for name in ("one", "two"):
        outcome = run(tmp_path / name, [*SMALL, *data_overrides(data), *changes], 2, hook=say_whether)
        assert outcome.codes == [0, 0], outcome.logs
    assert all(line["deterministic"] for line in lines_of(tmp_path / "one") if "event" not in line)
    assert numbers_of(tmp_path / "one") == numbers_of(tmp_path / "two")
