"""What rank 0 makes of what processes and hosts say of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_atum.launch import check_host
from megatron_atum.launch.check_gpus import GpuReport
from megatron_atum.launch.check_host import (
    Fabric,
    Facts,
    ask_fabric,
    clock_line,
    efa_domains,
    efa_line,
    gather_facts,
    gpus_of,
    limit_line,
    nodes_of,
    process_line,
    version_line,
    visible_line,
)
from megatron_atum.launch.check_report import (
    FAILED,
    NOT_CHECKED,
    OK,
    WARNING,
    Expected,
    Line,
    Node,
    spread,
    table,
    verdict,
)
from megatron_atum.launch.check_report import result as worst
from megatron_atum.launch.environment import Platform

FI_INFO = """provider: efa
    fabric: efa
    domain: rdmap16s27-rdm
    version: 122.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa-direct
    domain: rdmap16s27-rdm
    version: 122.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: efa
    fabric: efa
    domain: rdmap32s27-rdm
    version: 122.0
    type: FI_EP_RDM
    protocol: FI_PROTO_EFA
provider: tcp
    fabric: 172.31.0.0/20
    domain: ens5
"""
P4D = Platform(instance="p4d.24xlarge", efa_devices=("a", "b", "c", "d"), has_verbs=True, installer=(1, 48, 0))


def ranks(hosts: str, size: int, **changes: object) -> dict[int, Facts]:
    """One process for each letter, on the host of that name."""
    values = {"local_size": size, "devices": size, "versions": {"torch": "2.13.0"}, **changes}
    return {rank: Facts(host=host, local_rank=rank % size, **values) for rank, host in enumerate(hosts)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "labels", "wrong"),
    [
        (ranks("aabb", 2), ["a", "b"], ""),
        (ranks("aaaa", 2), ["a#0", "a#1"], ""),
        (ranks("a", 1), ["a"], ""),
        (ranks("abab", 2), ["a"], "rank 0 is on a, rank 1 on b"),
    ],
)
def test_nodes(facts: dict[int, Facts], labels: list[str], wrong: str) -> None:
    nodes, found = nodes_of(facts)
    assert ([node.label for node in nodes], found) == (labels, wrong)
    if not wrong:
        assert [rank for node in nodes for rank in node.ranks] == list(facts)


def test_processes() -> None:
    nodes = [Node("a", (0, 1)), Node("b", (2, 3))]
    assert process_line(nodes, "", [], 4, "gloo") == Line("processes", OK, "2 nodes x 2 processes, gloo")
    line = process_line(nodes, "", [5, 7], 8, "nccl")
    assert (line.status, line.found) == (FAILED, "6 of 8; nothing from ranks 5, 7")
    line = process_line(nodes, "rank 0 is on a, rank 1 on b", [], 4, "nccl")
    assert line.status == FAILED and "node by node" in line.advice
    line = process_line([Node("a", (0, 1)), Node("b", (2,))], "", [], 3, "nccl")
    assert (line.status, line.found) == (FAILED, "processes: 2 on a; 1 on b")
    line = process_line(nodes, "", [], 4, "nccl", Expected("p4d", "A100", 8, 1.0, 1.0))
    assert line.status == WARNING and line.found.endswith("p4d has 8 devices a node")
    assert process_line(nodes, "", [], 4, "nccl", Expected("own", "A100", 2, 1.0, 1.0)).status == OK


def test_versions() -> None:
    facts = ranks("aabb", 2)
    nodes, _ = nodes_of(facts)
    assert version_line(facts, nodes) == Line("versions", OK, "torch 2.13.0")
    facts[3] = Facts(**{**vars(facts[3]), "versions": {"torch": "2.12.1"}})
    line = version_line(facts, nodes)
    assert (line.status, line.found) == (FAILED, "torch 2.13.0 on a; 2.12.1 and 2.13.0 on b")
    facts[2] = facts[3]
    assert version_line(facts, nodes).found == "torch 2.13.0 on a; 2.12.1 on b"


def test_gpus_that_processes_see() -> None:
    """All of the node's, or, bound by Slurm, one each."""
    everything, own = ranks("aaaa", 4), {rank: Facts("a", 0, 4, 1, {}) for rank in range(4)}
    node = Node("a", (0, 1, 2, 3))
    assert (gpus_of(everything, node), gpus_of(own, node), gpus_of(ranks("a", 1), Node("a", (0,)))) == (4, 4, 1)
    assert visible_line(everything, [node]) is None and visible_line(own, [node]) is None
    assert visible_line(ranks("aaaa", 4, devices=0), [node]) is None  # no GPUs
    line = visible_line(ranks("aaaa", 4, devices=2), [node])
    assert line is not None and line.status == FAILED
    assert line.found == "rank 2 has LOCAL_RANK=2 and sees 2 GPUs (2 such ranks)"


@pytest.mark.parametrize(
    ("offsets", "missing", "status", "found"),
    [
        ({}, [], NOT_CHECKED, "one host"),
        ({"b": (0.002, 0.001), "c": (-0.01, 0.001)}, [], OK, "at most 0.010 s apart from the first host's (c; "),
        ({"b": (-2.0, 0.001)}, [], WARNING, "at most 2.000 s"),
        (
            {"b": (2.0, 0.001), "c": (-900.0, 0.1)},
            [],
            FAILED,
            "at most 900.000 s apart from the first host's (c; known",
        ),
        ({"b": (0.0, 0.001)}, ["c"], WARNING, "no answer from c"),
    ],
)
def test_clocks(offsets: dict[str, tuple[float, float]], missing: list[str], status: str, found: str) -> None:
    line = clock_line(offsets, missing)
    assert line.status == status
    assert line.found.startswith(found)


def test_fi_info_is_understood() -> None:
    assert efa_domains(FI_INFO) == 2
    assert efa_domains("fi_getinfo: -61 (No data available)") == 0
    assert efa_domains(FI_INFO[FI_INFO.index("provider: tcp") :]) == 0


@pytest.mark.parametrize(
    ("script", "fabric"),
    [
        (f"cat <<'END'\n{FI_INFO}\nEND", Fabric(P4D, 2)),
        (
            "echo 'fi_getinfo: -61 (No data available)' >&2; exit 61",
            Fabric(P4D, 0, "fi_getinfo: -61 (No data available)"),
        ),
        ("exit 0", Fabric(P4D, 0, "it lists none")),
        (None, Fabric(P4D, 0, "[Errno 2] No such file or directory: '/nowhere/fi_info'")),
    ],
)
def test_fi_info_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, fabric: Fabric) -> None:
    if script is not None:
        (tmp_path / "fi_info").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "fi_info").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(check_host, "detect", lambda environ: P4D)
    monkeypatch.setattr(check_host, "FI_INFO", "/nowhere/fi_info")
    assert ask_fabric() == fabric


def on(**changes: object) -> Platform:
    return Platform(**{**vars(P4D), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fabrics", "status", "found"),
    [
        ([Fabric()], NOT_CHECKED, "no such device"),
        (
            [Fabric(P4D, 4), Fabric(P4D, 4)],
            OK,
            "p4d.24xlarge, 4 devices, libfabric's provider efa has 4, EFA installer 1",
        ),
        ([Fabric(P4D, 4), Fabric(on(efa_devices=("a", "b", "c")), 3)], FAILED, "3 devices"),
        ([Fabric(on(efa_devices=("a",)), 1)] * 2, FAILED, "1 devices"),
        ([Fabric(on(efa_devices=("a",)), 1)], WARNING, "1 devices"),
        ([Fabric(on(efa_devices=()))] * 2, FAILED, "0 devices"),
        ([Fabric(on(efa_devices=()))], WARNING, "0 devices"),
        ([Fabric(on(instance="ml.p4d.24xlarge", efa_devices=("a", "b")), 2)] * 2, FAILED, "2 devices"),
        ([Fabric(on(instance="g5.8xlarge", efa_devices=("a",)), 1)], OK, "1 devices"),
        ([Fabric(on(has_verbs=False), 4)] * 2, FAILED, "4 devices"),
        ([Fabric(P4D, 4), Fabric(on(installer=(1, 30, 0)), 4)], FAILED, "EFA installer 1.48.0 on n0; p4d.24xlarge, 4"),
        ([Fabric(P4D, 0, "it lists none")], WARNING, "fi_info: it lists none"),
    ],
)
def test_efa(fabrics: list[Fabric], status: str, found: str) -> None:
    line = efa_line({f"n{number}": fabric for number, fabric in enumerate(fabrics)})
    assert line.status == status
    assert found in line.found
    assert bool(line.advice) == (status in (FAILED, WARNING))


@pytest.mark.parametrize(
    ("limits", "fabric", "status", "found"),
    [
        ((-1, -1), Fabric(), OK, "unlimited open files; memory that may be pinned: unlimited"),
        ((4096, 64), Fabric(), OK, "4096 open files; memory that may be pinned: 64"),
        ((4096, 64), Fabric(P4D), FAILED, "4096 open files; memory that may be pinned: 64"),
        ((4096, -1), Fabric(P4D), OK, "4096 open files"),
        ((1024, -1), Fabric(), FAILED, "1024 open files"),
    ],
)
def test_limits(limits: tuple[int, int], fabric: Fabric, status: str, found: str) -> None:
    line = limit_line({"a": Facts("a", 0, 8, 8, {}, *limits, fabric=fabric)}, 512)
    assert (line.status, bool(line.advice)) == (status, status == FAILED)
    assert line.found.startswith(found)


def test_facts_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    facts = gather_facts(0, {"torch": "x"}, of_host=False)
    assert (facts.local_rank, facts.local_size, facts.devices, facts.gpus) == (1, 2, 0, None)
    assert {"Python", "torch", "megatron-core", "transformer-engine", "apex"} <= facts.versions.keys()
    assert isinstance(gather_facts(0, {}, of_host=True).gpus, GpuReport)


# The report ----------------------------------------------------------------------------------------------------------

LINES = [Line("clocks", OK, "fine"), Line("EFA", NOT_CHECKED, "none"), Line("GPUs", WARNING, "odd", "look")]


def test_table_and_verdict() -> None:
    assert table(LINES).splitlines() == [
        "clocks  ok           fine",
        "EFA     not checked  none",
        "GPUs    warning      odd",
        "                     -> look",
    ]
    assert verdict(LINES) == "verdict: warning; a run can start, but look at: GPUs (not checked: EFA)"
    assert worst(LINES[:2]) == OK and verdict(LINES[:1]).startswith("verdict: ok; nothing that was checked")
    failed = [*LINES, Line("versions", FAILED, "two")]
    assert worst(failed) == FAILED
    assert verdict(failed).startswith("verdict: failed; do not start a run before this is mended: versions (not")


def test_spread() -> None:
    assert spread({"n0": "1", "n1": "1"}) == "1"
    assert spread({"n0": "1", "n1": "2", "n2": "1"}) == "1 on n0, n2; 2 on n1"
