"""The small layouts of cases.py, run once for all tests."""

from __future__ import annotations

import pytest

from megatron_atum.planning.dry_run import DryRun
from tests.distributed import run_distributed
from tests.planning.cases import RealRun, play_all, train_all


@pytest.fixture(scope="session")
def real() -> list[dict[str, RealRun]]:
    """By rank and layout."""
    return run_distributed(train_all, 4, timeout=300)


@pytest.fixture(scope="session")
def played() -> dict[str, list[DryRun]]:
    """By layout, of the ranks of cases.PLAYED."""
    (runs,) = run_distributed(play_all, 1, timeout=300)
    return runs
