"""What each process and each host says of itself, and whether it fits together."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from megatron_atum.errors import first_line, listed
from megatron_atum.launch.check_gpus import GpuReport, KernelLog, ask_gpus, ask_kernel
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Expected, Line, Node, spread
from megatron_atum.launch.environment import Platform, detect, dotted
from megatron_atum.parallel.limits import files_needed

PACKAGES = ("megatron_atum", "megatron-core", "transformer-engine", "apex")
FI_INFO = "/opt/amazon/efa/bin/fi_info"
# EFA devices by instance type, of AWS's table of EFA network cards.
EFA_DEVICES = {"p4d.24xlarge": 4, "p4de.24xlarge": 4, "p5.48xlarge": 32, "p5e.48xlarge": 32, "p5en.48xlarge": 16}
SKEW_WARNS_S = 1.0  # times in logs of different hosts cannot be compared any more
SKEW_FAILS_S = 300.0  # munge, and with it Slurm, takes nothing that is older (munge(7)); S3 allows 15 minutes


@dataclass(frozen=True)
class Fabric:
    """EFA on a host."""

    platform: Platform = Platform()
    domains: int = 0  # devices that libfabric can use
    problem: str = ""  # why that is not known


@dataclass(frozen=True)
class Facts:
    """Of one process."""

    host: str
    local_rank: int
    local_size: int
    devices: int  # GPUs that torch sees
    versions: dict[str, str]
    open_files: int = -1  # that it may have, as hard limit; -1 unlimited
    pinned_kib: int = -1  # of memory
    # Of the host, told by one process of each:
    gpus: GpuReport | None = None
    kernel: KernelLog = field(default_factory=KernelLog)
    fabric: Fabric = field(default_factory=Fabric)


def gather_facts(devices: int, versions: Mapping[str, str], *, of_host: bool) -> Facts:
    """Args: versions: what only torch knows. of_host: whether to tell about the host too, which takes a second."""
    facts = Facts(
        host=socket.gethostname(),
        local_rank=int(os.environ["LOCAL_RANK"]),
        local_size=int(os.environ["LOCAL_WORLD_SIZE"]),
        devices=devices,
        versions={"Python": platform.python_version(), **versions, **_packages()},
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        pinned_kib=_kib(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
    )
    if not of_host:
        return facts
    return Facts(**{**vars(facts), "gpus": ask_gpus(), "kernel": ask_kernel(), "fabric": ask_fabric()})


def _kib(size: int) -> int:
    return size if size == resource.RLIM_INFINITY else size // 1024


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def ask_fabric() -> Fabric:
    here = detect(os.environ)
    if not here.efa:
        return Fabric(here)
    program = shutil.which("fi_info") or FI_INFO
    try:
        command = [program, "-p", "efa", "-t", "FI_EP_RDM"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Fabric(here, problem=first_line(error))
    domains = efa_domains(done.stdout)
    return Fabric(here, domains, "" if domains else (done.stderr or done.stdout).strip()[:200] or "it lists none")


def efa_domains(text: str) -> int:
    """Devices in the output of fi_info; one may appear with several fabrics."""
    blocks = re.findall(r"provider: efa\b.*?(?=^provider:|\Z)", text, re.DOTALL | re.MULTILINE)
    domains = [found[1] for block in blocks if (found := re.search(r"domain: (\S+)", block))]
    return len({re.sub(r"-(rdm|dgrm)$", "", domain) for domain in domains})


# What rank 0 makes of it ---------------------------------------------------------------------------------------------


def nodes_of(facts: Mapping[int, Facts]) -> tuple[list[Node], str]:
    """The hosts, with their ranks in order.

    Args:
        facts: of all ranks.

    Returns:
        and what is wrong with the order; "" if nothing is.
    """
    nodes: list[Node] = []
    ranks = sorted(facts)
    while ranks:
        first = facts[ranks[0]]
        own, ranks = ranks[: first.local_size], ranks[first.local_size :]
        nodes.append(Node(first.host, tuple(own)))
        strangers = [rank for rank in own if facts[rank].host != first.host]
        if strangers:
            return nodes, f"rank {own[0]} is on {first.host}, rank {strangers[0]} on {facts[strangers[0]].host}"
    names = [node.label for node in nodes]
    if len(set(names)) < len(names):  # several to a host, as in tests
        nodes = [Node(f"{node.label}#{number}", node.ranks) for number, node in enumerate(nodes)]
    return nodes, ""


def process_line(
    nodes: Sequence[Node],
    wrong: str,
    missing: Sequence[int],
    world_size: int,
    backend: str,
    expected: Expected | None = None,
) -> Line:
    """Args: wrong: with the order of ranks. missing: ranks that have said nothing."""
    name = "processes"
    if missing:
        found = (
            f"{world_size - len(missing)} of {world_size}; nothing from ranks {listed([str(x) for x in missing], 8)}"
        )
        return Line(name, FAILED, found, "see their logs; they did not start, or cannot reach MASTER_ADDR:MASTER_PORT")
    if wrong:
        advice = "number ranks node by node (srun --distribution=block), as parallel.tensor expects"
        return Line(name, FAILED, wrong, advice)
    sizes = {node.label: str(len(node.ranks)) for node in nodes}
    if len(set(sizes.values())) > 1:
        return Line(name, FAILED, f"processes: {spread(sizes)}", "start equally many on each node")
    per_node = len(nodes[0].ranks)
    found = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} x {per_node} processes, {backend}"
    if expected is not None and per_node != expected.devices_per_node:
        found += f"; {expected.cluster} has {expected.devices_per_node} devices a node"
        return Line(name, WARNING, found, "start as many processes on each node, or name the cluster that this is")
    return Line(name, OK, found)


def version_line(facts: Mapping[int, Facts], nodes: Sequence[Node]) -> Line:
    """Of all processes, by host: two containers on one host may differ too."""
    names = list(dict.fromkeys(name for one in facts.values() for name in one.versions))
    differ: list[str] = []
    same: list[str] = []
    for name in names:
        values = {
            node.label: " and ".join(sorted({facts[rank].versions.get(name, "none") for rank in node.ranks}))
            for node in nodes
        }
        found = f"{name} {spread(values)}"
        mixed = len(set(values.values())) > 1 or " and " in next(iter(values.values()))
        (differ if mixed else same).append(found)
    if differ:
        return Line("versions", FAILED, "; ".join(differ), "start all processes from one image")
    return Line("versions", OK, ", ".join(same))


def gpus_of(facts: Mapping[int, Facts], node: Node) -> int:
    """GPUs that a node's processes see together. Slurm may show each process one of its own, as number 0."""
    seen = [facts[rank].devices for rank in node.ranks]
    own = max(seen) == 1 and all(facts[rank].local_rank == 0 for rank in node.ranks)
    return sum(seen) if own else max(seen)


def visible_line(facts: Mapping[int, Facts], nodes: Sequence[Node]) -> Line | None:
    """None where there is nothing wrong: LOCAL_RANK must be the number of a GPU that the process sees."""
    blind = [rank for rank, one in facts.items() if 0 < one.devices <= one.local_rank]
    if not blind:
        return None
    one = facts[blind[0]]
    found = f"rank {blind[0]} has LOCAL_RANK={one.local_rank} and sees {one.devices} GPUs ({len(blind)} such ranks)"
    return Line("GPU of each process", FAILED, found, "as many processes as GPUs on a node, each seeing all GPUs")


def clock_line(offsets: Mapping[str, tuple[float, float]], missing: Sequence[str]) -> Line:
    """Args: offsets: by host, against the first one, and how exactly they are known (s). missing: hosts."""
    name = "clocks"
    if missing:
        return Line(name, WARNING, f"no answer from {listed(list(missing), 3)}")
    if not offsets:
        return Line(name, NOT_CHECKED, "one host")
    worst = max(offsets, key=lambda label: abs(offsets[label][0]))
    offset, error = offsets[worst]
    found = f"at most {abs(offset):.3f} s apart from the first host's ({worst}; known to {error:.3f} s)"
    status = FAILED if abs(offset) > SKEW_FAILS_S else WARNING if abs(offset) > SKEW_WARNS_S else OK
    return Line(name, status, found, "" if status == OK else "let chrony set the clocks (chronyc tracking)")


def limit_line(hosts: Mapping[str, Facts], world_size: int) -> Line:
    """Args: hosts: one process of each."""
    name = "limits"
    found = spread({label: f"{_count(one.open_files)} open files" for label, one in hosts.items()})
    found += "; memory that may be pinned: " + spread({label: _count(one.pinned_kib) for label, one in hosts.items()})
    few = [label for label, one in hosts.items() if 0 <= one.open_files < files_needed(world_size)]
    if few:
        advice = (
            f"{world_size} ranks need {files_needed(world_size)} files: raise the hard limit (LimitNOFILE of slurmd)"
        )
        return Line(name, FAILED, found, f"{advice} on {listed(few, 3)}")
    small = [label for label, one in hosts.items() if one.pinned_kib >= 0 and one.fabric.platform.efa_devices]
    if small:
        return Line(name, FAILED, found, f"EFA pins memory: ulimit -l unlimited (LimitMEMLOCK) on {listed(small, 3)}")
    return Line(name, OK, found)


def _count(limit: int) -> str:
    return "unlimited" if limit < 0 else str(limit)


def efa_line(fabrics: Mapping[str, Fabric]) -> Line:
    """Args: by host. A host by itself needs no network."""
    name, bad = "EFA", FAILED if len(fabrics) > 1 else WARNING
    if not any(fabric.platform.efa for fabric in fabrics.values()):
        return Line(name, NOT_CHECKED, "no such device, no such instance type")
    found = spread({label: _fabric_text(fabric) for label, fabric in fabrics.items()})
    counts = {label: len(fabric.platform.efa_devices) for label, fabric in fabrics.items()}
    lacks = [label for label, fabric in fabrics.items() if not fabric.platform.efa_devices]
    few = [label for label, fabric in fabrics.items() if counts[label] < _expected(fabric)]
    if lacks or few or len(set(counts.values())) > 1:
        advice = "all EFA interfaces must be attached when the instance is launched"
        return Line(name, bad, found, f"{advice}: too few on {listed(lacks or few or list(counts), 3)}")
    if not all(fabric.platform.has_verbs for fabric in fabrics.values()):
        return Line(name, bad, found, "start the container with --device=/dev/infiniband")
    if any(fabric.problem for fabric in fabrics.values()):
        advice = "fi_info -p efa must list the devices: install libfabric with the EFA installer, in the image too"
        return Line(name, WARNING, found, advice)
    if len({_fabric_text(fabric) for fabric in fabrics.values()}) > 1:
        return Line(name, FAILED, found, "use one image, and one type of instance, on all nodes")
    return Line(name, OK, found)


def _expected(fabric: Fabric) -> int:
    return EFA_DEVICES.get(fabric.platform.instance.removeprefix("ml."), 0)


def _fabric_text(fabric: Fabric) -> str:
    here = fabric.platform
    parts = [f"{here.instance or 'unknown instance'}, {len(here.efa_devices)} devices"]
    parts.append(f"fi_info: {fabric.problem}" if fabric.problem else f"libfabric's provider efa has {fabric.domains}")
    parts += [f"EFA installer {dotted(here.installer)}"] if here.installer else []
    parts += [f"aws-ofi-nccl {dotted(here.plugin)}"] if here.plugin else []
    return ", ".join(parts)
