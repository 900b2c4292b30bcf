"""Work spread over processes."""

from __future__ import annotations

import os

import pytest

from megatron_atum.data.processes import in_processes
from megatron_atum.errors import DataError


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def die(number: int) -> None:
    os._exit(number)


def refuse(number: int) -> None:
    raise DataError(f"not {number}")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_item_has_its_result(workers: int) -> None:
    found = dict(in_processes(square, range(40), workers))
    assert {item: result for item, (result, _) in found.items()} == {n: n * n for n in range(40)}
    assert (os.getpid() in {process for _, process in found.values()}) == (workers == 0)


def test_nothing_to_do() -> None:
    assert list(in_processes(square, [], 2)) == []


def test_a_worker_that_dies_is_noticed() -> None:
    with pytest.raises(DataError, match="a worker died"):
        list(in_processes(die, [9], 1))


def test_what_the_work_raises_comes_through() -> None:
    with pytest.raises(DataError, match=r"not [78]"):
        list(in_processes(refuse, [7, 8], 1))
