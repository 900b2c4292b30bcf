"""Which network NCCL has chosen, by what it says with NCCL_DEBUG=INFO."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_atum.errors import listed
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING, Line, spread

DEBUG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,ENV,NET"}  # for what is read here; with NCCL_DEBUG_FILE


@dataclass(frozen=True)
class NcclLog:
    """Of one process. Empty and 0 where it says nothing."""

    version: str = ""
    network: str = ""  # Socket, IB, Libfabric ("AWS Libfabric" up to aws-ofi-nccl 1.11)
    plugin: str = ""  # version of aws-ofi-nccl
    provider: str = ""  # of libfabric: efa, tcp
    nics: int = 0
    protocol: str = ""  # of aws-ofi-nccl: RDMA, SENDRECV
    channels: int = 0  # to other nodes
    direct_channels: int = 0  # of them, from and to the GPU's memory (GPUDirect RDMA)
    warnings: tuple[str, ...] = ()
    failure: str = ""  # of the network that it was told to use

    @property
    def summary(self) -> str:
        parts = [f"network {self.network or 'unknown'}"]
        parts += [f"provider {self.provider}, {self.nics or 'unknown'} devices"] if self.provider else []
        parts += [f"aws-ofi-nccl {self.plugin}"] if self.plugin else []
        parts += [f"protocol {self.protocol}"] if self.protocol else []
        return ", ".join(parts)


def read_log(text: str) -> NcclLog:
    provider = _last(r"NET/OFI Selected [Pp]rovider is ([\w;-]+)(?:.*\(found (\d+) nics\))?", text)
    channels = re.findall(r"\[(?:send|receive)\] via NET/([\w ]+)/\d+(?:\(\d+\))?(/GDRDMA)?", text)
    return NcclLog(
        version=_last(r"NCCL version (\S+)", text)[0],
        # The later one counts: a plug-in that is loaded may still find nothing that it can use.
        network=_last(r"NCCL INFO (?:NET/\S+ : )?Using network ([\w ]+)", text)[0].strip(),
        plugin=_last(r"NET/OFI (?:Using|Initializing) aws-ofi-nccl (\S+)", text)[0],
        provider=provider[0],
        nics=int(provider[1] or 0),
        protocol=_last(r"NET/OFI Using transport protocol (\w+)", text)[0],
        channels=len(channels),
        direct_channels=sum(bool(direct) for _, direct in channels),
        failure=_last(
            r"NCCL (?:INFO|WARN) (Failed to initialize any NET plugin|.*[Nn]etwork .*not found.*?)\s*$", text
        )[0],
        warnings=tuple(dict.fromkeys(re.findall(r"NCCL WARN (.*?)\s*$", text, re.MULTILINE))),
    )


def _last(pattern: str, text: str) -> tuple[str, str]:
    """The groups of the last match, filled up to two."""
    found = list(re.finditer(pattern, text, re.MULTILINE))
    groups = [group or "" for group in found[-1].groups()] if found else []
    first, second = (*groups, "", "")[:2]
    return first, second


def network_line(logs: Mapping[str, NcclLog], *, efa: bool, several_nodes: bool) -> Line:
    """Args: logs: by label of the process; empty where there is no NCCL. efa: there is such a device."""
    name = "NCCL's network"
    if not logs:
        return Line(name, NOT_CHECKED, "no NCCL: no GPU, communication goes over gloo")
    versions = sorted({log.version for log in logs.values() if log.version})  # not every process says it
    channels = sum(log.channels for log in logs.values())
    direct = sum(log.direct_channels for log in logs.values())
    warnings = list(dict.fromkeys(warning for log in logs.values() for warning in log.warnings))
    parts = [f"NCCL {' and '.join(versions)}"] if versions else []
    parts.append(spread({label: log.summary for label, log in logs.items()}))
    parts += [f"GPUDirect on {direct} of {channels} channels to other nodes"] if channels else []
    parts += [f"NCCL fails: {failure}" for failure in dict.fromkeys(log.failure for log in logs.values()) if failure]
    parts += [f"NCCL warns: {listed(warnings, 3, '; ')}"] if warnings else []
    status, advice = _judged(list(logs.values()), efa, several_nodes)
    if len({log.network for log in logs.values()}) > 1 or len(versions) > 1:
        status, advice = FAILED, "versions or networks differ: start all from one image, compare the hosts' devices"
    return Line(name, WARNING if status == OK and warnings else status, "; ".join(parts), advice)


_NO_EFA = (
    "EFA is there, and NCCL uses TCP or nothing between nodes: the image needs libfabric and aws-ofi-nccl (EFA "
    "installer) on its library path, the container --device=/dev/infiniband, the security group all traffic from and "
    "to itself"
)


def _judged(logs: list[NcclLog], efa: bool, several_nodes: bool) -> tuple[str, str]:
    if any(log.failure for log in logs):
        return FAILED, _NO_EFA
    if any(not log.network for log in logs):
        return WARNING, "NCCL's log does not say which network it uses; run with NCCL_DEBUG=INFO and look for NET/"
    on_tcp = [log for log in logs if log.network == "Socket" or log.provider in ("tcp", "sockets")]
    if on_tcp and efa:
        return FAILED if several_nodes else WARNING, _NO_EFA
    if on_tcp and several_nodes:
        return WARNING, "NCCL uses TCP between nodes; a fast network needs its driver and plug-in in the image"
    if efa and any(log.provider != "efa" for log in logs):
        return FAILED, "EFA is there, and libfabric uses another provider; FI_PROVIDER=efa, and see fi_info -p efa"
    if efa and any(log.direct_channels < log.channels for log in logs):
        return WARNING, "EFA without GPUDirect RDMA: p4d and later have it; update EFA installer and GPU driver"
    return OK, ""
