"""How fast ranks talk to each other, inside a node and between nodes: what the planner's cluster files say of a link.

Inside a node: bus bandwidth of each device. Between nodes: of each whole node, one direction (docs/planning.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_atum.errors import listed
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Expected, Line, Node, in_gb
from megatron_atum.parallel.device import device, wait_for_device

INSIDE_REDUCE, INSIDE_SEND = "all-reduce inside nodes", "send inside nodes"
BETWEEN_REDUCE, BETWEEN_SEND = "all-reduce between nodes", "send between nodes"
REPEATS = 5
SLOW, TOO_SLOW = 0.8, 0.5  # of what the cluster file says: warned of, failed
STRAGGLER = 0.5  # of the median node


def measure(
    nodes: Sequence[Node], rank: int, size: int, timeout_s: float, step: Callable[[str], None]
) -> dict[str, float]:
    """Rates of this rank in bytes per second. Collective over all ranks.

    Args:
        nodes: with equally many ranks.
        size: bytes of a message.
        timeout_s: of a collective.
        step: is called before each measurement, with its name.

    Raises:
        RuntimeError: a collective failed, or gave a wrong sum.
    """
    here = next(number for number, node in enumerate(nodes) if rank in node.ranks)
    own, place = nodes[here].ranks, nodes[here].ranks.index(rank)
    step("process groups")
    group, _ = dist.new_subgroups_by_enumeration(
        [list(node.ranks) for node in nodes], timeout=timedelta(seconds=timeout_s)
    )
    data = torch.ones(max(1, size // 4), device=device())
    _check_sum(rank, dist.get_world_size())
    rates = {}
    if len(own) > 1:
        step(INSIDE_REDUCE)
        rates[INSIDE_REDUCE] = _all_reduce(data, group, len(own))
        step(INSIDE_SEND)
        rates[INSIDE_SEND] = _shift(data, own[(place + 1) % len(own)], own[place - 1])
    if len(nodes) > 1:
        step(BETWEEN_REDUCE)
        rates[BETWEEN_REDUCE] = _all_reduce(data, None, dist.get_world_size())
        step(BETWEEN_SEND)
        following, previous = nodes[(here + 1) % len(nodes)].ranks, nodes[here - 1].ranks
        rates[BETWEEN_SEND] = _shift(data, following[place], previous[place])
    return rates


def _check_sum(rank: int, world_size: int) -> None:
    number = torch.full((1024,), float(rank + 1), device=device())
    dist.all_reduce(number)
    wanted = world_size * (world_size + 1) / 2
    if not bool((number == wanted).all()):
        found = f"{number.min():g} to {number.max():g}"
        raise RuntimeError(f"an all-reduce of the numbers 1 to {world_size} gave {found} instead of {wanted:g}")


def _all_reduce(data: torch.Tensor, group: dist.ProcessGroup | None, size: int) -> float:
    """Bus bandwidth: what each device must send at least, 2 (n - 1) / n of the message, over the time."""
    data.fill_(1.0 / size)  # sums stay finite
    seconds = _seconds(lambda: dist.all_reduce(data, group=group))
    return 2 * (size - 1) / size * data.numel() * 4 / seconds


def _shift(data: torch.Tensor, to: int, source: int) -> float:
    """Every rank sends and receives at once."""
    received = torch.empty_like(data)

    def exchange() -> None:
        sends = [dist.P2POp(dist.isend, data, to), dist.P2POp(dist.irecv, received, source)]
        for work in dist.batch_isend_irecv(sends):
            work.wait()

    return data.numel() * 4 / _seconds(exchange)


def _seconds(run: Callable[[], object]) -> float:
    """Of one run, after one to warm up."""
    run()
    _meet()
    began = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait_for_device()
    return (time.perf_counter() - began) / REPEATS


def _meet() -> None:
    """All ranks, all done with what they have issued."""
    dist.all_reduce(torch.zeros(1, device=device()))
    wait_for_device()


# What rank 0 makes of it ---------------------------------------------------------------------------------------------


def link_lines(
    rates: Mapping[int, Mapping[str, float]], problems: Sequence[str], nodes: Sequence[Node], expected: Expected | None
) -> tuple[list[Line], dict[str, float]]:
    """Args: rates: by rank. problems: what went wrong on ranks.

    Returns:
        lines; and the slowest node's rate of each measurement, bytes per second.
    """
    if problems:
        advice = "see the logs of these ranks; with NCCL, NCCL_DEBUG=INFO; between nodes, firewalls and security groups"
        return [Line("bandwidth", FAILED, listed(list(problems), 3, "; "), advice)], {}
    lines, slowest = [], {}
    for name, wanted in _wanted(expected).items():
        of_nodes = _of_nodes(name, rates, nodes)
        if not of_nodes:
            alone = "one process a node" if name in (INSIDE_REDUCE, INSIDE_SEND) else "one node"
            lines.append(Line(name, NOT_CHECKED, alone))
            continue
        slowest[name] = min(of_nodes.values())
        lines.append(_rate_line(name, of_nodes, wanted, expected))
    return lines, slowest


def _wanted(expected: Expected | None) -> dict[str, float]:
    """0: nothing is known. A device that sends to one other reaches less of its links than a collective does."""
    inside, between = (expected.node_link, expected.network) if expected else (0.0, 0.0)
    return {INSIDE_REDUCE: inside, INSIDE_SEND: 0.0, BETWEEN_REDUCE: between, BETWEEN_SEND: between}


def _of_nodes(name: str, rates: Mapping[int, Mapping[str, float]], nodes: Sequence[Node]) -> dict[str, float]:
    """By node: what its devices send together to another node, else what its slowest device reaches."""
    combine: Callable[[list[float]], float] = sum if name == BETWEEN_SEND else min
    found = {node.label: [rates[rank][name] for rank in node.ranks if name in rates.get(rank, {})] for node in nodes}
    return {label: combine(values) for label, values in found.items() if values}


def _rate_line(name: str, of_nodes: Mapping[str, float], wanted: float, expected: Expected | None) -> Line:
    worst = min(of_nodes, key=lambda label: of_nodes[label])
    rate, median = of_nodes[worst], statistics.median(of_nodes.values())
    found = in_gb(rate) + (f" at {worst}, {in_gb(median)} in the median" if len(of_nodes) > 1 else "")
    place = "nvidia-smi topo -m and nvidia-smi nvlink -s" if "inside" in name else "the lines EFA and NCCL's network"
    if expected is not None and wanted:
        found += f"; {rate / wanted:.0%} of {in_gb(wanted)} of {expected.cluster}"
        status = FAILED if rate < TOO_SLOW * wanted else WARNING if rate < SLOW * wanted else OK
        if status != OK:
            return Line(name, status, found, f"compare with nccl-tests (docs/planning.md); look at {place}")
    if rate < STRAGGLER * median:
        return Line(name, WARNING, found, f"{worst} is a straggler: leave it out and see whether the rate returns")
    return Line(name, OK, found)
