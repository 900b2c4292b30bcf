"""The cost model against hand counts, and its pipeline against a simulation of megatron-core's schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_atum.planning.cluster import Cluster, Device, Link
from megatron_atum.planning.cost import (
    Block,
    Collective,
    DataParallel,
    Group,
    Job,
    block_seconds,
    predict,
    ring_s,
)

# Round numbers: 100 FLOP/s of products, 10 of attention, 50 B/s of memory, 40 B/s inside a node, 16 B/s out of it.
DEVICE = Device("round", 1.0, 0.0, 200.0, 0.5, 0.05, 50.0, 0.25)
CLUSTER = Cluster("round", 4, 4, DEVICE, Link(40.0, 0.5), Link(16.0, 1.0))
ALONE, PAIR = Group(1, 1), Group(2, 2)
NO_DATA = DataParallel(ALONE, 0.0, 0.0)


def test_a_block_by_hand() -> None:
    block = Block(
        "b",
        gemm_forward=400.0,
        gemm_backward=800.0,
        attention_forward=20.0,
        attention_backward=50.0,
        traffic_forward=100.0,
        traffic_backward=300.0,
        kernels_forward=4.0,
        kernels_backward=8.0,
    )
    alone = block_seconds(block, ALONE, CLUSTER)
    assert (alone.forward, alone.backward) == (4 + 2 + 2 + 1, 8 + 5 + 6 + 2)
    pair = block_seconds(block, PAIR, CLUSTER)  # launches are not shared
    assert (pair.forward, pair.backward) == (2 + 1 + 1 + 1, 4 + 2.5 + 3 + 2)
    assert block_seconds(replace(block, gemm_share=0.5), ALONE, CLUSTER).forward == 4 * 2 + 2 + 2 + 1


def test_a_ring_by_hand() -> None:
    assert ring_s(80.0, ALONE, CLUSTER) == 0
    assert ring_s(80.0, Group(4, 4), CLUSTER) == 0.75 * 80 / 40 + 0.5
    assert ring_s(80.0, Group(16, 4), CLUSTER) == 15 / 16 * 80 / 16 + 1  # all of a node's network
    assert ring_s(80.0, Group(4, 1), CLUSTER) == 0.75 * 80 / 4 + 1  # shared with three others
    assert ring_s(80.0, Group(8, 2), CLUSTER) == 7 / 8 * 80 / 8 + 1
    assert Collective("all_gather", 80.0, 3).seconds(PAIR, CLUSTER) == 3 * (40 / 40 + 0.5)
    assert Collective("all_reduce", 80.0).seconds(PAIR, CLUSTER) == 2 * (40 / 40 + 0.5)


def test_a_group_is_where_its_ranks_are() -> None:
    assert Group.of(range(4), CLUSTER) == Group(4, 4)
    assert Group.of((0, 4, 8, 12), CLUSTER) == Group(4, 1)
    assert Group.of((0, 2, 4, 6), CLUSTER) == Group(4, 2)
    assert Group.of((2, 3, 4, 5, 6, 7), CLUSTER) == Group(6, 4)
    fast = replace(CLUSTER, network=Link(1e6, 1.0))
    assert Group(8, 4).link(fast).bytes_per_s == 40  # no faster than inside a node


def test_collectives_wait_unless_they_hide() -> None:
    wait = Collective("all_gather", 80.0)
    block = Block("b", gemm_forward=200.0, gemm_backward=200.0, collectives=(wait, replace(wait, backward=True)))
    seconds = block_seconds(block, PAIR, CLUSTER)
    assert (seconds.tensor_forward, seconds.tensor_backward) == (1.5, 1.5)
    hidden = replace(block, collectives=(Collective("all_gather", 80.0, backward=True, hidden=True),))
    assert block_seconds(hidden, PAIR, CLUSTER).tensor == 0.5  # of 1.5 s, one second of products hides 1
    assert block_seconds(replace(hidden, gemm_backward=0.0), PAIR, CLUSTER).tensor == 1.5


def job(*stages: float, microbatches: int = 8, virtual: int = 1, exchange_bytes: float = 0.0) -> Job:
    """Stages of so many seconds of forward and twice as many of backward."""
    blocks = tuple((Block("b", gemm_forward=100 * s, gemm_backward=200 * s),) for s in stages)
    return Job(blocks, microbatches, ALONE, NO_DATA, 0.0, virtual, exchange_bytes)


def test_parts_add_up_and_shares_are_of_the_whole() -> None:
    data = DataParallel(Group(4, 1), 64.0, 32.0)
    prediction = predict(replace(job(1.0, 2.0, exchange_bytes=4.0), data=data, optimizer_values=100.0), CLUSTER)
    assert prediction.compute_s == 8 * 6
    assert prediction.bubble_s == 3  # one microbatch through the other stage
    assert prediction.exchange_s == 2 * (8 + 1) * (4 * 4 / 16 + 1)
    assert prediction.optimizer_s == 100 * 46 / 50 + 0.05  # gradient norm, clipping, Adam, cast
    gradients, parameters = 0.75 * 64 / 4 + 1, 0.75 * 32 / 4 + 1
    # forward of the slowest stage is 2 s, backward 4 s: they hide less than 0.7 of either
    assert prediction.data_s == pytest.approx(gradients - 4 + parameters - 2)
    parts = ("compute_s", "tensor_s", "bubble_s", "exchange_s", "data_s", "optimizer_s")
    assert prediction.step_s == pytest.approx(sum(getattr(prediction, part) for part in parts))
    assert prediction.bubble_share == 3 / 51
    assert prediction.imbalance == pytest.approx(6 / 4.5 - 1)


def test_data_parallel_ranks_hide_a_share_at_most() -> None:
    data = DataParallel(Group(4, 1), 64.0, 32.0)
    long = data.exposed_s(CLUSTER, forward=1000.0, backward=1000.0)
    assert long == pytest.approx(0.3 * (13 + 7))
    assert replace(data, gradient_overlap=0.0, parameter_overlap=0.0).exposed_s(CLUSTER, 1e3, 1e3) == 13 + 7
    assert replace(data, parameter_bytes=0.0).exposed_s(CLUSTER, 1e3, 1e3) == pytest.approx(0.3 * 2 * 13)
    assert NO_DATA.exposed_s(CLUSTER, 1.0, 1.0) == 0


def test_exchanges_hide_under_the_interleaved_schedule_only() -> None:
    plain, interleaved = job(1.0, 1.0, exchange_bytes=1.0), job(1.0, 1.0, virtual=2, exchange_bytes=1.0)
    one = 1.0 * 4 / 16 + 1
    assert predict(plain, CLUSTER).exchange_s == 2 * 9 * one
    # a chunk's forward takes 0.5 s, its backward 1 s; the edges are 2 (P - 1) + (V - 1) P = 4
    assert predict(interleaved, CLUSTER).exchange_s == pytest.approx(2 * 4 * one + 16 * (one - 0.5 + one - 1))
    assert predict(job(10.0, 10.0, virtual=2, exchange_bytes=1.0), CLUSTER).exchange_s == 2 * 4 * one
    inside = replace(plain, exchange_crosses_nodes=False)
    assert predict(inside, CLUSTER).exchange_s == 2 * 9 * (1 / 40 + 0.5)
    assert predict(job(1.0, exchange_bytes=1.0), CLUSTER).exchange_s == 0


@pytest.mark.parametrize(
    ("stages", "microbatches", "virtual"),
    [
        ((1.0,) * 4, 8, 1),
        ((1.0,) * 4, 3, 1),
        ((1.0,) * 4, 8, 5),
        ((1.0,) * 8, 64, 3),
        ((1.0, 1.0, 1.0, 1.2), 8, 1),
        ((1.2, 1.0, 1.0, 1.0), 56, 1),
        ((1.0, 1.3, 1.0, 1.1), 16, 1),
        ((1.2, 1.0, 1.0, 1.0), 56, 5),
    ],
)
def test_the_pipeline_against_a_simulation(stages: tuple[float, ...], microbatches: int, virtual: int) -> None:
    """Equal stages exactly; of unequal ones the slowest hides some of its filling, which is left out."""
    prediction = predict(job(*stages, microbatches=microbatches, virtual=virtual), CLUSTER)
    ours = prediction.compute_s + prediction.bubble_s
    expected = simulated([(s, 2 * s) for s in stages], microbatches, virtual)
    if len(set(stages)) == 1:
        assert ours == pytest.approx(expected)
    else:
        assert expected <= ours + 1e-9 <= 1.025 * expected


def simulated(stages: list[tuple[float, float]], microbatches: int, virtual: int) -> float:
    """Seconds until the last backward of megatron-core's schedules, without communication.

    Args:
        stages: forward and backward of one microbatch through all chunks of each stage.
    """
    number = len(stages)
    orders = [order(stage, number, microbatches, virtual) for stage in range(number)]
    ends: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * number, [0] * number
    while any(place < len(steps) for place, steps in zip(places, orders, strict=True)):
        before = list(places)
        for stage, steps in enumerate(orders):
            while places[stage] < len(steps):
                kind, chunk, microbatch = steps[places[stage]]
                index = chunk * number + stage
                needed = [("F", index - 1, microbatch)] if kind == "F" and index else []
                if kind == "B":
                    needed = [("F", index, microbatch)]
                    needed += [("B", index + 1, microbatch)] if index < number * virtual - 1 else []
                if any(key not in ends for key in needed):
                    break
                start = max([clocks[stage], *(ends[key] for key in needed)])
                clocks[stage] = start + stages[stage][kind == "B"] / virtual
                ends[kind, index, microbatch] = clocks[stage]
                places[stage] += 1
        assert places != before, "the schedule hangs"
    return max(clocks)


def order(stage: int, stages: int, microbatches: int, virtual: int) -> list[tuple[str, int, int]]:
    """(F or B, chunk, microbatch) as schedules.py runs them on a stage."""
    table = [
        (chunk, microbatch)
        for start in range(0, microbatches, stages)
        for chunk in range(virtual)
        for microbatch in range(start, min(start + stages, microbatches))
    ]
    if virtual == 1:
        table = [(0, microbatch) for microbatch in range(microbatches)]
    ahead = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    ahead = min(ahead, len(table))
    forwards = [("F", chunk, microbatch) for chunk, microbatch in table]
    backwards = [("B", virtual - 1 - chunk, microbatch) for chunk, microbatch in table]
    steady = [step for pair in zip(forwards[ahead:], backwards, strict=False) for step in pair]
    return [*forwards[:ahead], *steady, *backwards[len(table) - ahead :]]
