"""What a check of a cluster says: one line per check, a table of them, a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_atum.errors import listed

OK, WARNING, FAILED, NOT_CHECKED = "ok", "warning", "failed", "not checked"


@dataclass(frozen=True)
class Line:
    name: str
    status: str
    found: str
    advice: str = ""  # what to do about it


@dataclass(frozen=True)
class Node:
    """A machine as rank 0 sees it."""

    label: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Expected:
    """What the planner's cluster file says; rates in bytes per second."""

    cluster: str
    device: str
    devices_per_node: int
    node_link: float
    network: float


def table(lines: Sequence[Line]) -> str:
    """Columns check, result, what was found; advice below its line."""
    name, status = (
        max(len(text) for text in column) for column in zip(*((x.name, x.status) for x in lines), strict=True)
    )
    rows = []
    for line in lines:
        rows.append(f"{line.name:<{name}}  {line.status:<{status}}  {line.found}")
        if line.advice:
            rows.append(f"{'':<{name}}  {'':<{status}}  -> {line.advice}")
    return "\n".join(rows)


def result(lines: Sequence[Line]) -> str:
    """The worst of all."""
    return next((status for status in (FAILED, WARNING) if any(line.status == status for line in lines)), OK)


def verdict(lines: Sequence[Line]) -> str:
    found = result(lines)
    names = [line.name for line in lines if line.status == found]
    skipped = [line.name for line in lines if line.status == NOT_CHECKED]
    says = {
        OK: "nothing that was checked is in the way of a run",
        WARNING: f"a run can start, but look at: {listed(names, 6)}",
        FAILED: f"do not start a run before this is mended: {listed(names, 6)}",
    }[found]
    return f"verdict: {found}; {says}" + (f" (not checked: {', '.join(skipped)})" if skipped else "")


def spread(values: Mapping[str, str]) -> str:
    """`2.13.0`, or who has what where not all have the same: `2.13.0 on n0, n1; 2.12.1 on n2`."""
    holders: dict[str, list[str]] = {}
    for label, value in values.items():
        holders.setdefault(value, []).append(label)
    if len(holders) == 1:
        return next(iter(holders))
    return "; ".join(f"{value} on {listed(labels, 3)}" for value, labels in holders.items())


def in_gb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"
