"""The helper itself: a test that hangs or swallows an error would make every other test worthless."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed import DistributedError, run_distributed

# What the ranks run --------------------------------------------------------------------------------------------------


def describe(rank: int, world_size: int, value: dict) -> dict:
    print(f"hello from rank {rank}")
    return {
        "rank": rank,
        "env": [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")],
        "group": [dist.get_rank(), dist.get_world_size(), dist.get_backend()],
        "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
        "megatron": "megatron.core" in sys.modules,
        "tensor": value["tensor"] + rank,
    }


def add_up(rank: int, world_size: int) -> torch.Tensor:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return total


def add_up_on_gpu(rank: int, world_size: int) -> tuple[str, float]:
    total = torch.ones(3, device="cuda")
    dist.all_reduce(total)
    return str(total.device), total.sum().item()


def raise_on_rank_1(rank: int, world_size: int) -> None:
    print(f"rank {rank} prints before it fails")
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def wait_for_rank_that_sleeps(rank: int, world_size: int, pid_folder: str) -> None:
    (Path(pid_folder) / str(os.getpid())).touch()
    if rank == 1:
        subprocess.Popen(["sleep", "600"])  # must not outlive the run either
        sleep_for_long()
    dist.barrier()


def sleep_for_long() -> None:
    time.sleep(600)


def return_a_lambda(rank: int, world_size: int) -> object:
    return lambda: rank


def _running_in_groups(groups: list[int]) -> list[str]:
    running = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) in groups and process.status() != psutil.STATUS_ZOMBIE:
                running.append(f"{process.pid} {process.name()}")
    return running


# The tests -----------------------------------------------------------------------------------------------------------


def test_results_come_in_rank_order(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"tensor": torch.arange(3)}
    results = run_distributed(describe, 2, given)
    for rank, result in enumerate(results):
        assert result["rank"] == rank
        assert result["env"] == [str(rank), str(rank), "2"]
        assert result["group"] == [rank, 2, "gloo"]
        assert result["threads"] == [1, "1"]
        assert result["megatron"], "the server has not imported megatron.core"
        assert torch.equal(result["tensor"], torch.arange(3) + rank)
    assert torch.equal(given["tensor"], torch.arange(3)), "ranks must not share memory with the test"
    printed = capsys.readouterr()
    assert "hello from rank 0\nhello from rank 1\n" in printed.out
    assert "Apex" not in printed.out + printed.err


def test_all_reduce_on_four_ranks() -> None:
    assert [result.item() for result in run_distributed(add_up, 4)] == [10.0] * 4


@pytest.mark.gpu
def test_all_reduce_on_gpus() -> None:
    count = min(4, torch.cuda.device_count())
    expected = [(f"cuda:{rank}", 3.0 * count) for rank in range(count)]
    assert run_distributed(add_up_on_gpu, count, backend="nccl") == expected


def test_a_second_launch_is_quick() -> None:
    run_distributed(add_up, 4)
    started = time.monotonic()
    run_distributed(add_up, 4)
    assert time.monotonic() - started < 1.5


def test_an_exception_names_its_rank_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError) as caught:
        run_distributed(raise_on_rank_1, 4, timeout=60)
    message = str(caught.value)
    assert caught.value.rank == 1
    assert message.startswith("rank 1 of raise_on_rank_1: raised")
    assert "ValueError: the reason" in message
    assert "in raise_on_rank_1" in message
    assert "rank 1 prints before it fails" in message
    assert time.monotonic() - started < 30


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(DistributedError, match="rank 1 of die_on_rank_1: died, signal SIGKILL"):
        run_distributed(die_on_rank_1, 2, timeout=60)


def test_a_hang_ends_at_the_timeout_with_every_stack(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError) as caught:
        run_distributed(wait_for_rank_that_sleeps, 2, str(tmp_path), timeout=4)
    assert 4 <= time.monotonic() - started < 12
    message = str(caught.value)
    assert "still running: ranks [0, 1]" in message
    first, second = message.split("--- rank 1 ---")
    assert "barrier" in first
    assert "sleep_for_long" in second
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert _running_in_groups(pids) == []  # a process group has the number of its first process


def test_a_result_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(DistributedError, match="rank 0 of return_a_lambda: raised"):
        run_distributed(return_a_lambda, 1)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(TypeError, match="top level"):
        run_distributed(lambda rank, world_size: rank, 2)
