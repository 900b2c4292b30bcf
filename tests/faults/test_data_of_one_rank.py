"""Something about the data goes wrong on one rank: all ranks end with the same message, and none hangs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.runs import SMALL, Outcome, data_overrides, run

DP2 = [*SMALL, "data.workers=1", "training.steps=6", "checkpoint.save_every=0"]


def trained(root: Path, data: Path, hook: Callable[[int], None], *changes: str) -> Outcome:
    return run(root, [*DP2, *data_overrides(data), *changes], 2, hook=hook, outlive_s=6)


def plan_otherwise(rank: int) -> None:
    """Rank 1 has another copy of a sidecar, with one sample fewer."""
    from megatron_atum.data import order

    usable = order._usable
    if rank == 1:
        order._usable = lambda index, shard: tuple(part[1:] for part in usable(index, shard))  # type: ignore[assignment]


def have_no_sidecar(rank: int) -> None:
    from megatron_atum.data.index import SourceIndex
    from megatron_atum.errors import DataError

    def missing(self: SourceIndex, shard: int) -> Any:
        raise DataError("0.tar.index.safetensors is missing")

    if rank == 1:
        SourceIndex.sidecar = missing  # type: ignore[method-assign]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("hook", "said"), [(plan_otherwise, "ranks plan different rows"), (have_no_sidecar, "safetensors is missing")]
)
def test_files_that_differ(hook: Callable[[int], None], said: str, workers: int, data: Path, tmp_path: Path) -> None:
    outcome = trained(tmp_path, data, hook, f"data.workers={workers}")
    assert outcome.codes == [2, 2], outcome.logs
    for log in outcome.logs:
        assert log.count(said) == 1 and "Traceback" not in log, log


def run_out_of_memory(rank: int) -> None:
    from megatron_atum.data.microbatch import MicrobatchBuilder

    build = MicrobatchBuilder.build

    def built(self: MicrobatchBuilder, packs: Any) -> Any:
        if packs[0].id >= 6:
            raise MemoryError("no room for pixels")
        return build(self, packs)

    if rank == 1:
        MicrobatchBuilder.build = built  # type: ignore[method-assign]


def kill_the_worker(rank: int) -> None:
    """After the second step, from outside, as the kernel does when memory runs out."""
    from megatron_atum.training.engine import Engine

    compute, done = Engine.compute, []

    def computed(self: Engine, *arguments: Any) -> Any:
        done.append(1)
        if rank == 1 and len(done) == 2:
            for child in psutil.Process().children():
                os.kill(child.pid, signal.SIGKILL)
        return compute(self, *arguments)

    Engine.compute = computed  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("hook", "workers", "said"),
    [(run_out_of_memory, 0, "MemoryError: no room for pixels"), (kill_the_worker, 1, "a decoding process ended")],
)
def test_what_is_not_the_fault_of_the_data(
    hook: Callable[[int], None], workers: int, said: str, data: Path, tmp_path: Path
) -> None:
    """Not exit code 2: starting again may help."""
    outcome = trained(tmp_path, data, hook, f"data.workers={workers}", "training.steps=60")
    assert outcome.codes == [1, 1], outcome.logs
    for log in outcome.logs:
        assert "DataFailure" in log and said in log, log
