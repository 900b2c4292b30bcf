"""What is counted, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_atum.planning.recorder import GRAIN, Memory, Recorder, _operation
from tests.distributed import run_distributed


def test_products() -> None:
    left, right = torch.randn(3, 5, requires_grad=True), torch.randn(5, 7)
    query, key = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (6, 9))
    image = torch.randn(2, 3, 8, 8)
    with Recorder() as recorder:
        recorder.phase = "linear"
        (left @ right).sum().backward()  # the second has no gradient
        recorder.phase = "attention"
        F.scaled_dot_product_attention(query, key, key).sum().backward()
        recorder.phase = "image"
        F.conv2d(image, torch.randn(10, 3, 4, 4), stride=4)
    attention = 4 * 2 * 4 * 6 * 9 * 8
    assert dict(recorder.flops) == {
        ("linear", "gemm"): 2 * 2 * 3 * 5 * 7,
        ("attention", "attention"): attention + 2 * attention,
        ("image", "convolution"): 2 * 2 * 4 * 10 * 3 * 16,
    }


def test_causal_attention_is_counted_in_full() -> None:
    query = torch.randn(1, 2, 16, 8)
    with Recorder() as recorder:
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert recorder.flops["", "attention"] == 4 * 2 * 16 * 16 * 8


def test_memory_is_what_lives() -> None:
    with Recorder() as recorder:
        memory = recorder.memory
        first = torch.zeros(1000)  # 4000 bytes, 8 grains
        second = first + 1
        view = second[10:]
        assert memory.live == 2 * 8 * GRAIN
        del first
        assert memory.live == 8 * GRAIN
        del second
        assert memory.live == 8 * GRAIN, "a view keeps its storage"
        tiny = torch.zeros(1)
        assert memory.live == 9 * GRAIN
        del view, tiny
    assert (memory.live, memory.peak) == (0, 2 * 8 * GRAIN)


def test_what_was_there_before_counts_when_it_is_shown() -> None:
    memory, weight = Memory(), torch.zeros(GRAIN)
    memory.watch([weight, weight[:3]])
    memory.watch([weight])
    assert (memory.live, memory.peak) == (4 * GRAIN, 4 * GRAIN)


def exchanged(rank: int, world_size: int) -> dict[tuple[str, str, int], tuple[int, int]]:
    alone = dist.new_group([0]), dist.new_group([1])
    with Recorder() as recorder:
        recorder.phase = "all"
        whole, part = torch.zeros(64), torch.zeros(32)
        dist.all_reduce(whole)
        dist.all_reduce(whole, group=alone[rank])  # moves nothing
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.all_gather([torch.zeros(32), torch.zeros(32)], part)
        dist.broadcast(part, 0)
        dist.barrier()
        (dist.send if rank == 0 else dist.recv)(whole, 1 - rank)
    return {
        (transfer.phase, transfer.operation, len(transfer.ranks)): (calls, recorder.payload[transfer])
        for transfer, calls in recorder.calls.items()
    }


def test_messages() -> None:
    """The larger side of each, in bytes."""
    found = run_distributed(exchanged, 2)
    for rank, peer in ((0, "send"), (1, "receive")):
        assert found[rank] == {
            ("all", "all_reduce", 2): (1, 256),
            ("all", "all_gather", 2): (2, 2 * 256),
            ("all", "reduce_scatter", 2): (1, 256),
            ("all", "broadcast", 2): (1, 128),
            ("all", peer, 1): (1, 256),
        }


def test_an_unknown_collective_is_no_silence() -> None:
    assert _operation("_allgather_base_") == "all_gather" and _operation("barrier") is None
    with pytest.raises(ValueError, match="alltoall_base_"):
        _operation("alltoall_base_")
    with pytest.raises(ValueError):
        Recorder()._message(SimpleNamespace(_schema=SimpleNamespace(name="c10d::gather_")), ())
