"""What one rank cannot do, none does."""

from __future__ import annotations

import pytest

from megatron_atum.errors import ConfigError, DataError
from megatron_atum.parallel.agreement import check_equal, together
from tests.distributed import run_distributed


def work_failing_on(rank: int, world_size: int, failing: int | None) -> str:
    def work() -> int:
        if rank == failing:
            raise DataError(f"bad shard on rank {rank}")
        return 10 + rank

    try:
        return f"value {together(work)}"
    except DataError as error:
        return f"raised {error}"


def test_together_returns_each_ranks_value() -> None:
    assert run_distributed(work_failing_on, 3, None) == ["value 10", "value 11", "value 12"]


@pytest.mark.parametrize("failing", [0, 2])
def test_together_raises_the_error_of_any_rank_on_all(failing: int) -> None:
    assert run_distributed(work_failing_on, 3, failing) == [f"raised bad shard on rank {failing}"] * 3


def compare(rank: int, world_size: int, different: bool) -> str:
    try:
        check_equal({"step": rank if different else 5, "seed": 1})
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_start_differently_are_refused_everywhere() -> None:
    assert run_distributed(compare, 2, False) == ["", ""]
    for message in run_distributed(compare, 2, True):
        assert "rank 0 and rank 1 start differently: step is 0 there and 1 here" in message
