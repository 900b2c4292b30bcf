"""What NCCL says of its network, in the words of several versions."""

from __future__ import annotations

import pytest

from megatron_atum.launch.check_nccl import NcclLog, network_line, read_log
from megatron_atum.launch.check_report import FAILED, NOT_CHECKED, OK, WARNING

P4D_OLD = """
ip-10-1-2-3:4101:4101 [0] NCCL INFO Bootstrap : Using ens32:10.1.2.3<0>
ip-10-1-2-3:4101:4101 [0] NCCL INFO NET/Plugin: Failed to find ncclCollNetPlugin symbol (v4 or v5).
NCCL version 2.18.5+cuda12.1
ip-10-1-2-3:4101:4180 [0] NCCL INFO NET/OFI Using aws-ofi-nccl 1.5.0aws
ip-10-1-2-3:4101:4180 [0] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
ip-10-1-2-3:4101:4180 [0] NCCL INFO Using network AWS Libfabric
ip-10-1-2-3:4101:4180 [0] NCCL INFO NCCL_PROTO set by environment to simple
ip-10-1-2-3:4101:4180 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [receive] via NET/AWS Libfabric/0/GDRDMA
ip-10-1-2-3:4101:4180 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/AWS Libfabric/0/GDRDMA
ip-10-1-2-3:4101:4180 [0] NCCL INFO Channel 01 : 0[0] -> 1[1] via P2P/IPC/read
"""
P5_NEW = """
node-7:88:88 [3] NCCL INFO NCCL version 2.27.7+cuda12.9
node-7:88:301 [3] NCCL INFO NET/Plugin: Loaded net plugin Libfabric (v10)
node-7:88:301 [3] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.17.2
node-7:88:301 [3] NCCL INFO NET/OFI Using Libfabric version 2.3
node-7:88:301 [3] NCCL INFO NET/OFI Selected provider is efa, fabric is efa-direct (found 32 nics)
node-7:88:301 [3] NCCL INFO NET/OFI Using transport protocol RDMA (platform set)
node-7:88:301 [3] NCCL INFO Initialized NET plugin Libfabric
node-7:88:301 [3] NCCL INFO Assigned NET plugin Libfabric to comm
node-7:88:301 [3] NCCL INFO Using network Libfabric
node-7:88:330 [3] NCCL INFO Channel 02/0 : 3[3] -> 11[3] [send] via NET/Libfabric/6/GDRDMA
"""
NO_PLUGIN = """
algo-1:51:51 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so. Using internal net plugin.
algo-1:51:60 [0] NCCL INFO NET/IB : No device found.
algo-1:51:60 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.8.1<0>
algo-1:51:60 [0] NCCL INFO Using network Socket
algo-1:51:60 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
"""
PLUGIN_ON_TCP = """
n1:9:21 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.19.0
n1:9:21 [0] NCCL WARN NET/OFI No eligible providers were found
n1:9:21 [0] NCCL INFO NET/OFI Selected provider is tcp, fabric is 172.31.32.0/20 (found 1 nics)
n1:9:21 [0] NCCL INFO Using network Libfabric
n1:9:21 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Libfabric/0
"""
PLUGIN_FAILS = """
n1:9:21 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.16.2
n1:9:21 [0] NCCL INFO NET/OFI Setting provider_filter to efa
n1:9:21 [0] nccl_net_ofi_create_plugin:213 NCCL WARN NET/OFI Unable to find a protocol that worked.
n1:9:21 [0] NCCL INFO NET/Socket : Using [0]ens5:172.31.0.9<0>
n1:9:21 [0] NCCL INFO Using network Socket
"""
TOLD = """
n1:9:21 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so. Using internal net plugin.
n1:9:21 [0] net.cc:312 NCCL WARN Error: network AWS Libfabric not found.
"""
TOLD_NEW = """
n1:9:21 [0] NCCL INFO NCCL_NET set by environment to AWS Libfabric.
n1:9:21 [0] plugin/net.cc:315 NCCL WARN Failed to initialize any NET plugin
"""
WITHOUT_GPUDIRECT = P5_NEW.replace("/GDRDMA", "").replace("RDMA (platform set)", "SENDRECV")
INFINIBAND = """
dgx-3:70:70 [1] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB bond0:10.9.0.3<0>
dgx-3:70:91 [1] NCCL INFO Using network IB
dgx-3:70:91 [1] NCCL INFO Channel 00/0 : 1[1] -> 9[1] [send] via NET/IB/1/GDRDMA
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (P4D_OLD, NcclLog("2.18.5+cuda12.1", "AWS Libfabric", "1.5.0aws", "efa", 4, "", 2, 2)),
        (P5_NEW, NcclLog("2.27.7+cuda12.9", "Libfabric", "1.17.2", "efa", 32, "RDMA", 1, 1)),
        (NO_PLUGIN, NcclLog("", "Socket", "", "", 0, "", 1, 0)),
        (
            PLUGIN_ON_TCP,
            NcclLog("", "Libfabric", "1.19.0", "tcp", 1, "", 1, 0, ("NET/OFI No eligible providers were found",)),
        ),
        (
            PLUGIN_FAILS,
            NcclLog("", "Socket", "1.16.2", warnings=("NET/OFI Unable to find a protocol that worked.",)),
        ),
        (INFINIBAND, NcclLog("", "IB", "", "", 0, "", 1, 1)),
        (
            P5_NEW + NO_PLUGIN,
            NcclLog("2.27.7+cuda12.9", "Socket", "1.17.2", "efa", 32, "RDMA", 2, 1),
        ),  # the later counts
        ("", NcclLog()),
    ],
)
def test_logs_are_understood(text: str, expected: NcclLog) -> None:
    assert read_log(text) == expected


@pytest.mark.parametrize(
    ("texts", "efa", "several", "status", "found", "advice"),
    [
        (
            [P4D_OLD],
            True,
            True,
            OK,
            "NCCL 2.18.5+cuda12.1; network AWS Libfabric, provider efa, 4 devices, aws-ofi-nccl 1.5.0aws; GPUD",
            "",
        ),
        ([P5_NEW, P5_NEW], True, True, OK, "protocol RDMA; GPUDirect on 2 of 2 channels to other nodes", ""),
        ([NO_PLUGIN], True, True, FAILED, "network Socket", "EFA is there, and NCCL uses TCP"),
        ([NO_PLUGIN], True, False, WARNING, "network Socket", "EFA is there, and NCCL uses TCP"),
        ([TOLD], True, True, FAILED, "NCCL fails: Error: network AWS Libfabric not found.", "EFA is there"),
        ([TOLD_NEW], True, True, FAILED, "NCCL fails: Failed to initialize any NET plugin", "EFA is there"),
        ([NO_PLUGIN], False, True, WARNING, "network Socket", "NCCL uses TCP between nodes"),
        ([NO_PLUGIN], False, False, OK, "network Socket", ""),
        ([PLUGIN_ON_TCP], True, True, FAILED, "NCCL warns: NET/OFI No eligible providers", "NCCL uses TCP"),
        ([PLUGIN_FAILS], True, True, FAILED, "NCCL warns: NET/OFI Unable to find a protocol", "NCCL uses TCP"),
        (
            [WITHOUT_GPUDIRECT],
            True,
            True,
            WARNING,
            "protocol SENDRECV; GPUDirect on 0 of 1 ch",
            "EFA without GPUDirect RDMA",
        ),
        ([INFINIBAND], False, True, OK, "network IB; GPUDirect on 1 of 1", ""),
        ([INFINIBAND], True, True, FAILED, "network IB", "libfabric uses another provider"),
        (
            [P5_NEW, NO_PLUGIN],
            False,
            True,
            FAILED,
            "on rank 0; network Socket on rank 1",
            "versions or networks differ",
        ),
        ([P5_NEW, P5_NEW.replace("2.27.7", "2.28.3")], True, True, FAILED, "NCCL 2.27.7+cuda12.9 and 2.28.3", "differ"),
        (["n1:9:21 [0] NCCL INFO cudaDriverVersion 12040"], True, True, WARNING, "unknown", "does not say"),
        ([], True, True, NOT_CHECKED, "no NCCL", ""),
    ],
)
def test_the_network_is_judged(
    texts: list[str], efa: bool, several: bool, status: str, found: str, advice: str
) -> None:
    logs = {f"rank {rank}": read_log(text) for rank, text in enumerate(texts)}
    line = network_line(logs, efa=efa, several_nodes=several)
    assert (line.status, line.name) == (status, "NCCL's network")
    assert found in line.found
    assert advice in line.advice and bool(advice) == bool(line.advice)
