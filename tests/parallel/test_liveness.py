"""Who is named when a rank falls out. Whole runs are in tests/faults/test_requests.py."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_atum.parallel import liveness
from megatron_atum.parallel.liveness import Liveness, of_others, waits
from tests.distributed import run_distributed


@pytest.mark.parametrize(
    ("error", "others"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:4711"), True),
        (RuntimeError("Timed out waiting 8000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled system error"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (torch.OutOfMemoryError("CUDA out of memory while NCCL was set up"), False),
        (AssertionError("timed out"), False),
        (ZeroDivisionError("a bug"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_whose_trouble_an_error_is(error: Exception, others: bool) -> None:
    assert of_others(error) is others


def frames_of(call: Any) -> list[FrameType]:
    """The stack at the place where `call` raises."""
    try:
        call()
    except ZeroDivisionError as error:
        found, trace = [], error.__traceback__
        while trace is not None:
            found.append(trace.tb_frame)
            trace = trace.tb_next
        return found[::-1]
    raise AssertionError("did not raise")


def _busy() -> None:
    1 // 0  # noqa: B018


def _waiting() -> None:
    torch.tensor([1.0 // 0]).tolist()


def test_a_host_that_waits_for_its_device_waits_for_others() -> None:
    """Over NCCL a rank that waits for others stands in a copy of numbers from the device."""
    assert waits(frames_of(_waiting))
    assert not waits(frames_of(_busy))
    assert not waits([])


# Several ranks -------------------------------------------------------------------------------------------------------


def fall_out(rank: int, world_size: int, how: str, folder: str) -> str | None:
    """Rank 1 falls out; the others say what they think. Each as on a SageMaker host of its own."""
    os.environ["SM_OUTPUT_DIR"] = f"{folder}/{rank}"
    os.mkdir(os.environ["SM_OUTPUT_DIR"])
    liveness.POLL_S, liveness.DEAD_S, liveness.ALARM_S, liveness.REPORTS_S = 0.1, 1.0, 0.5, 1.0
    mine = Liveness(60.0, "health.step_timeout_s")
    mine.at(7)
    said: list[str] = []
    liveness._print = said.append
    ended: list[int] = []
    liveness._leave = lambda: (ended.append(1), mine._over.set())  # type: ignore[assignment]
    dist.barrier()
    if rank == 1:
        if how == "error":
            return mine.last_words(ZeroDivisionError("a bug"))
        if how == "known":
            mine.failed(ValueError("too large"))
            time.sleep(4.0)
            return None
        mine._over.set()  # its thread ends without a word, as with a killed process
        time.sleep(6.0)
        return None
    deadline = time.monotonic() + 8.0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)  # not a wait for others, but what its stack shows is the test's
    assert ended == [1], said
    return said[-1]


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        ("error", "a bug"),
        ("known", "too large"),
        ("dead", "has not been heard of for 1 s: its process or node is gone"),
    ],
)
def test_a_rank_that_waits_in_vain_learns_of_it_and_ends(how: str, cause: str, tmp_path: Path) -> None:
    """As over NCCL, where no collective fails before its timeout."""
    said = run_distributed(fall_out, 3, how, str(tmp_path))
    for rank in (0, 2):
        assert (
            said[rank].startswith(f"rank {rank} on ") and "failed after step 7: another rank has failed" in said[rank]
        )
        assert "rank 1 (step 7, host" in said[rank] and cause in said[rank], said[rank]
        assert (tmp_path / str(rank) / "failure").read_text() == f"RankFailure: {said[rank]}"[:1024]


def get_on(rank: int, world_size: int) -> tuple[list[str], bool]:
    """Slower than the early warning, faster than the end."""
    liveness.POLL_S = 0.1
    mine = Liveness(1.0, "health.step_timeout_s")
    said: list[str] = []
    liveness._print = said.append
    if rank == 1:
        time.sleep(1.6)
    dist.barrier()
    mine.beat()
    time.sleep(0.5)
    over = mine._over.is_set()
    mine.stop()
    return said, over


def test_a_slow_rank_is_said_early_and_not_ended() -> None:
    (first, first_over), (other, _) = run_distributed(get_on, 2)
    assert not first_over
    (warning,) = first
    assert "has not got on for" in warning and "Look first at rank 1" in warning
    assert "stands still in" in warning and "test_liveness.py" in warning
    assert len(other) == 1 and "Look first" not in other[0]


def test_the_store_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mine = Liveness(60.0, "key")
        mine.stop()

        class Gone:
            def __getattr__(self, name: str) -> Any:
                raise dist.DistNetworkError("gone")

        mine._store = Gone()
        said = mine.last_words(RuntimeError("Connection closed by peer\nmore"))
        assert said.endswith(
            "failed after step 0: Connection closed by peer; the other ranks cannot be asked "
            "(DistNetworkError: the store is gone)"
        )
        mine.failed(ValueError("x"))
    finally:
        dist.destroy_process_group()
