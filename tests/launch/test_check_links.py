"""Bandwidths: measured by real processes, and compared with what is expected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_atum.launch import check_links
from megatron_atum.launch.check_links import (
    BETWEEN_REDUCE,
    BETWEEN_SEND,
    INSIDE_REDUCE,
    INSIDE_SEND,
    link_lines,
    measure,
)
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Expected, Node
from tests.distributed import run_distributed

TWO = [Node("a", (0, 1)), Node("b", (2, 3))]
P4D = Expected("p4d", "A100", 2, node_link=200e9, network=50e9)


def rates(**changes: float) -> dict[int, dict[str, float]]:
    """Of four ranks; changes by name of the node."""
    usual = {INSIDE_REDUCE: 200e9, INSIDE_SEND: 100e9, BETWEEN_REDUCE: 50e9, BETWEEN_SEND: 25e9}
    return {
        rank: {name: value * changes.get(node.label, 1.0) for name, value in usual.items()}
        for node in TWO
        for rank in node.ranks
    }


def test_what_is_expected() -> None:
    lines, slowest = link_lines(rates(), [], TWO, P4D)
    assert [(line.name, line.status) for line in lines] == [
        (name, OK) for name in (INSIDE_REDUCE, INSIDE_SEND, BETWEEN_REDUCE, BETWEEN_SEND)
    ]
    assert lines[0].found == "200 GB/s at a, 200 GB/s in the median; 100% of 200 GB/s of p4d"
    assert "p4d" not in lines[1].found
    assert slowest == {INSIDE_REDUCE: 200e9, INSIDE_SEND: 100e9, BETWEEN_REDUCE: 50e9, BETWEEN_SEND: 50e9}  # a node's


@pytest.mark.parametrize(("share", "status", "alone"), [(0.81, OK, OK), (0.79, WARNING, OK), (0.49, FAILED, WARNING)])
def test_a_slow_node(share: float, status: str, alone: str) -> None:
    """Against the cluster file; and without one against the others."""
    lines, _ = link_lines(rates(b=share), [], TWO, P4D)
    assert {line.name: line.status for line in lines if line.name != INSIDE_SEND} == dict.fromkeys(
        (INSIDE_REDUCE, BETWEEN_REDUCE, BETWEEN_SEND), status
    )
    assert all(" at b, " in line.found for line in lines)
    three = [*TWO, Node("c", (4, 5))]
    of_three = rates(b=share)
    lines, _ = link_lines({**of_three, 4: of_three[0], 5: of_three[1]}, [], three, None)
    assert {line.status for line in lines} == {alone}


def test_what_cannot_be_measured() -> None:
    inside = {rank: {INSIDE_REDUCE: 1e9, INSIDE_SEND: 1e9} for rank in (0, 1)}
    lines, slowest = link_lines(inside, [], TWO[:1], P4D)
    assert [line.status for line in lines] == [FAILED, OK, NOT_CHECKED, NOT_CHECKED]
    assert lines[2].found == "one node" and slowest.keys() == {INSIDE_REDUCE, INSIDE_SEND}
    between = {rank: {BETWEEN_REDUCE: 1e9, BETWEEN_SEND: 1e9} for rank in (0, 1)}
    lines, _ = link_lines(between, [], [Node("a", (0,)), Node("b", (1,))], None)
    assert [line.status for line in lines] == [NOT_CHECKED, NOT_CHECKED, OK, OK]
    lines, slowest = link_lines(rates(), ["rank 3: connection closed"], TWO, P4D)
    assert [(line.name, line.status, line.found) for line in lines] == [
        ("bandwidth", FAILED, "rank 3: connection closed")
    ]
    assert slowest == {}


def measured(rank: int, world_size: int, nodes: list[Node], wrong: bool) -> Any:
    steps: list[str] = []
    if wrong:
        reduce = dist.all_reduce

        def all_reduce(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            work = reduce(tensor, *arguments, **named)
            tensor[-1] += 1
            return work

        dist.all_reduce = all_reduce
    try:
        return measure(nodes, rank, 1 << 20, 60.0, steps.append), steps
    except RuntimeError as error:
        return str(error), steps


def test_measured_by_real_processes() -> None:
    for nodes in (TWO, [Node("a", (0, 1, 2, 3))], [Node(str(rank), (rank,)) for rank in range(4)]):
        names = [INSIDE_REDUCE, INSIDE_SEND] if len(nodes) < 4 else []
        names += [BETWEEN_REDUCE, BETWEEN_SEND] if len(nodes) > 1 else []
        for found, steps in run_distributed(measured, 4, nodes, False):
            assert steps == ["process groups", *names]
            assert list(found) == names
            assert all(1e5 < rate < 1e12 for rate in found.values())


def test_a_wrong_sum_is_found() -> None:
    for found, _ in run_distributed(measured, 2, [Node("a", (0, 1))], True):
        assert found == "an all-reduce of the numbers 1 to 2 gave 3 to 4 instead of 3"


def test_the_bus_bandwidth_is_that_of_nccl_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_links, "_seconds", lambda run: 2.0)
    assert check_links._all_reduce(torch.ones(1000), None, 4) == 2 * 3 / 4 * 4000 / 2.0
    assert check_links._shift(torch.ones(1000), 0, 0) == 4000 / 2.0
