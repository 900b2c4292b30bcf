"""The policy of variables: what is set, removed and left, and that each line says why."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_atum.launch.environment import POLICY, Platform, detect, prepare

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
P4D = Platform(instance="p4d.24xlarge", gpus=True, efa_devices=("rdmap16s27", "rdmap32s27"), has_verbs=True)
SAGEMAKER = Platform(**{**vars(P4D), "instance": "ml.p4d.24xlarge", "sagemaker": True})
TOOLKIT = {
    "FI_PROVIDER": "efa",
    "FI_EFA_USE_DEVICE_RDMA": "1",
    "RDMAV_FORK_SAFE": "1",
    "NCCL_PROTO": "simple",
    "NCCL_SOCKET_IFNAME": "eth0",
}
ON_EFA = {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0"}
ON_GPUS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "3600",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
}
BETWEEN_NODES = {"NCCL_NET": "AWS Libfabric", "NCCL_SOCKET_IFNAME": "^lo,docker,veth"}
OLD_PLUGIN = {"plugin": (1, 5, 0)}
LATER_PLUGIN = {"plugin": (1, 6, 0)}


def on(platform: Platform, **changes: object) -> Platform:
    return Platform(**{**vars(platform), **changes})


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    ("platform", "before", "after", "said"),
    [
        (Platform(), {}, {}, []),
        (
            Platform(gpus=True),
            {},
            ON_GPUS,
            ["TORCH_NCCL_ASYNC_ERROR_HANDLING=3: ", "TORCH_NCCL_HEART", "CUDA_DEVICE_MAX_C"],
        ),
        (Platform(slurm=True), {}, {"OMP_NUM_THREADS": "1"}, ["OMP_NUM_THREADS=1: as torchrun"]),
        (Platform(slurm=True), {"OMP_NUM_THREADS": "4"}, {"OMP_NUM_THREADS": "4"}, ["OMP_NUM_THREADS=4 was set"]),
        (
            P4D,
            {},
            ON_EFA | ON_GPUS,
            ["FI_PROVIDER=efa: ", "FI_EFA_USE_HUGE_PAGE=0: ", *["TORCH_NCCL_"] * 2, "CUDA_DEVICE_"],
        ),
        (P4D, ON_EFA | ON_GPUS, ON_EFA | ON_GPUS, []),
        # The user's own.
        (
            P4D,
            {"FI_PROVIDER": "tcp", "FI_EFA_USE_HUGE_PAGE": "1", **ON_GPUS},
            {"FI_PROVIDER": "tcp", "FI_EFA_USE_HUGE_PAGE": "1", **ON_GPUS},
            ["FI_PROVIDER=tcp was set from outside and stays, instead of efa", "FI_EFA_USE_HUGE_PAGE=1 was set"],
        ),
        (
            P4D,
            {"NCCL_PROTO": "LL", "RDMAV_FORK_SAFE": "1", "NCCL_BUFFSIZE": "8388608", **ON_EFA, **ON_GPUS},
            {"NCCL_PROTO": "LL", "RDMAV_FORK_SAFE": "1", "NCCL_BUFFSIZE": "8388608", **ON_EFA, **ON_GPUS},
            ["NCCL_PROTO=LL was set from outside and stays, but: ", "RDMAV_FORK_SAFE=1 was", "NCCL_BUFFSIZE=8388608 w"],
        ),
        (Platform(), {"NCCL_PROTO": "LL", "NCCL_BUFFSIZE": "1"}, {"NCCL_PROTO": "LL", "NCCL_BUFFSIZE": "1"}, []),
        (
            Platform(gpus=True),
            {"NCCL_ASYNC_ERROR_HANDLING": "1", **without(ON_GPUS, "TORCH_NCCL_ASYNC_ERROR_HANDLING")},
            {"NCCL_ASYNC_ERROR_HANDLING": "1", **without(ON_GPUS, "TORCH_NCCL_ASYNC_ERROR_HANDLING")},
            ["NCCL_ASYNC_ERROR_HANDLING=1 was set from outside and stays, but: an old name; use TORCH_NCCL_"],
        ),
        (
            Platform(),
            {"TORCH_NCCL_BLOCKING_WAIT": "1", "NCCL_BLOCKING_WAIT": "0"},
            {"TORCH_NCCL_BLOCKING_WAIT": "1", "NCCL_BLOCKING_WAIT": "0"},
            ["TORCH_NCCL_BLOCKING_WAIT=1 was set"],
        ),
        # The SageMaker toolkit's.
        (
            SAGEMAKER,
            TOOLKIT,
            {"FI_PROVIDER": "efa", "FI_EFA_USE_HUGE_PAGE": "0", "NCCL_SOCKET_IFNAME": "eth0", **ON_GPUS},
            [
                "NCCL_PROTO=simple of the SageMaker toolkit removed: ",
                "RDMAV_FORK_SAFE=1 of the SageMaker toolkit removed: ",
                "FI_EFA_USE_DEVICE_RDMA=1 of the SageMaker toolkit removed: ",
                *("FI_EFA_USE_HUGE_PAGE=0: ", "TORCH_NCCL_", "TORCH_NCCL_", "CUDA_DEVICE_"),
            ],
        ),
        (
            SAGEMAKER,
            {**TOOLKIT, "NCCL_PROTO": "LL128", **ON_EFA, **ON_GPUS},
            {"NCCL_PROTO": "LL128", "NCCL_SOCKET_IFNAME": "eth0", **ON_EFA, **ON_GPUS},
            [
                "RDMAV_FORK_SAFE=1 of",
                "FI_EFA_USE_DEVICE_RDMA=1 of",
                "NCCL_PROTO=LL128 was set from outside and stays, but",
            ],
        ),
        (
            P4D,
            {**TOOLKIT, **ON_EFA, **ON_GPUS},
            {**TOOLKIT, **ON_EFA, **ON_GPUS},
            ["NCCL_PROTO=simple w", "RDMAV_FORK_S"],
        ),
        (
            SAGEMAKER,
            {**TOOLKIT, **ON_EFA, **ON_GPUS, "ATUM_KEEP_ENV": "NCCL_PROTO, RDMAV_FORK_SAFE,FI_EFA_USE_DEVICE_RDMA"},
            {**TOOLKIT, **ON_EFA, **ON_GPUS, "ATUM_KEEP_ENV": "NCCL_PROTO, RDMAV_FORK_SAFE,FI_EFA_USE_DEVICE_RDMA"},
            [],
        ),
        (
            P4D,
            {"ATUM_KEEP_ENV": "FI_PROVIDER,MY_OWN", "FI_EFA_USE_HUGE_PAGE": "0", **ON_GPUS},
            {"ATUM_KEEP_ENV": "FI_PROVIDER,MY_OWN", "FI_EFA_USE_HUGE_PAGE": "0", **ON_GPUS},
            ["ATUM_KEEP_ENV names MY_OWN, which is never touched"],
        ),
        (
            SAGEMAKER,  # where the job's environment has it (launch/sagemaker.py)
            {"NCCL_PROTO": "simple", "ATUM_JOB_NCCL_PROTO": "simple", **ON_EFA, **ON_GPUS},
            {"NCCL_PROTO": "simple", "ATUM_JOB_NCCL_PROTO": "simple", **ON_EFA, **ON_GPUS},
            ["NCCL_PROTO=simple was set from outside and stays, but: "],
        ),
        # Versions of the plug-in and of the installer.
        (
            on(P4D, **LATER_PLUGIN),
            {**ON_EFA, **ON_GPUS},
            {**ON_EFA, **ON_GPUS, "FI_EFA_USE_DEVICE_RDMA": "1"},
            ["FI_EFA_USE_DEVICE_RDMA=1: aws-ofi-nccl before 1.7"],
        ),
        (
            on(SAGEMAKER, **OLD_PLUGIN),
            {**TOOLKIT, **ON_EFA, **ON_GPUS},
            without({**TOOLKIT, **ON_EFA, **ON_GPUS}, "RDMAV_FORK_SAFE"),
            [
                "RDMAV_FORK_SAFE=1 of",
                f"{HOST}: aws-ofi-nccl 1.5.0 is too old to run without NCCL_PROTO=simple: update it",
            ],
        ),
        (
            on(P4D, installer=(1, 29, 0), plugin=(1, 7, 4)),
            {**ON_EFA, **ON_GPUS},
            {**ON_EFA, **ON_GPUS, "FI_EFA_SET_CUDA_SYNC_MEMOPS": "0"},
            ["FI_EFA_SET_CUDA_SYNC_MEMOPS=0: "],
        ),
        (on(P4D, installer=(1, 48, 0), plugin=(1, 19, 0)), ON_EFA | ON_GPUS, ON_EFA | ON_GPUS, []),
        # Several nodes.
        (
            on(P4D, several_nodes=True),
            ON_EFA | ON_GPUS,
            ON_EFA | ON_GPUS | BETWEEN_NODES,
            ["NCCL_NET=AWS Libfabric: NCCL must end", "NCCL_SOCKET_IFNAME=^lo,docker,veth: "],
        ),
        (
            on(P4D, several_nodes=True, no_plugin=True),
            {"NCCL_SOCKET_IFNAME": "eth0", **ON_EFA, **ON_GPUS},
            {"NCCL_SOCKET_IFNAME": "eth0", **ON_EFA, **ON_GPUS},
            ["NCCL_SOCKET_IFNAME=eth0 was set from outside and stays"],
        ),
        (Platform(several_nodes=True, gpus=True), ON_GPUS, ON_GPUS, []),
        (
            Platform(sagemaker=True, interface="eth0"),
            {},
            {"GLOO_SOCKET_IFNAME": "eth0"},
            ["GLOO_SOCKET_IFNAME=eth0: gloo takes the address of the host's own name"],
        ),
        # EFA that cannot be used.
        (
            on(P4D, has_verbs=False, several_nodes=True),
            ON_EFA | ON_GPUS,
            ON_EFA | ON_GPUS | without(BETWEEN_NODES, "NCCL_NET"),
            ["NCCL_SOCKET", f"{HOST}: there are EFA devices, but no /dev/infiniband"],
        ),
        (
            on(P4D, efa_devices=(), several_nodes=True),
            ON_EFA | ON_GPUS,
            ON_EFA | ON_GPUS | without(BETWEEN_NODES, "NCCL_NET"),
            ["NCCL_SOCKET", f"{HOST}: no EFA device is in /sys/class/infiniband: between nodes NCCL can only use TCP"],
        ),
        (on(P4D, efa_devices=()), ON_EFA | ON_GPUS, ON_EFA | ON_GPUS, []),  # a node by itself needs none
        (on(P4D, has_verbs=False), ON_EFA | ON_GPUS, ON_EFA | ON_GPUS, []),
    ],
)
def test_policy(platform: Platform, before: dict[str, str], after: dict[str, str], said: list[str]) -> None:
    environ = dict(before)
    lines = prepare(environ, platform)
    assert environ == after
    assert len(lines) == len(said), lines
    for line, begins in zip(lines, said, strict=True):
        assert line.startswith(begins)
    prepare(environ, platform)
    assert environ == after  # a second time changes nothing


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [(0, 0, 3), (1, 1, 0), (8, 0, 1), (9, 1, 0)])
def test_each_node_tells_what_is_wrong_with_it(rank: int, local_rank: int, lines: int) -> None:
    environ = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "FI_PROVIDER": "efa"}
    found = prepare(environ, Platform(asks_for_efa=True, several_nodes=True))
    assert len(found) == lines and environ["FI_EFA_USE_HUGE_PAGE"] == "0"
    assert all("no EFA device" in line for line in found[-1:])


def test_what_must_not_be_set() -> None:
    """On no platform."""
    platforms = [
        Platform(
            instance,
            gpus,
            devices,
            verbs,
            asks,
            several,
            sagemaker=sagemaker,
            slurm=slurm,
            plugin=plugin,
            installer=installer,
        )
        for instance in ("", "p4d.24xlarge")
        for gpus in (False, True)
        for devices in ((), ("rdmap16s27",))
        for verbs in (False, True)
        for asks in (False, True)
        for several in (False, True)
        for sagemaker in (False, True)
        for slurm in (False, True)
        for plugin in (None, (1, 5, 0), (1, 6, 0), (1, 19, 0))
        for installer in (None, (1, 20, 0), (1, 48, 0))
    ]
    for platform in platforms:
        environ: dict[str, str] = {}
        prepare(environ, platform)
        assert [name for name in environ if name in ("NCCL_PROTO", "NCCL_BUFFSIZE") or name.startswith("RDMAV_")] == []


def test_every_row_says_why() -> None:
    for setting in POLICY:
        assert setting.does in ("set", "remove", "warn")
        assert len(setting.why) > 20, setting.name


INSTALLER = """# EFA installer version: 1.48.0
# Debug packages installed: no
# Packages installed:
efa-config_1.18_all efa-profile_1.7_all libfabric-aws-bin_2.4.0amzn1.0_amd64 {plugin} rdma-core_60.0-1_amd64
"""


def machine(
    root: Path, *, plugin: str = "libnccl-ofi_1.19.0-1_amd64", vendor: str = "0x1d0f", verbs: bool = True
) -> Path:
    (root / "opt/amazon").mkdir(parents=True)
    (root / "opt/amazon/efa_installed_packages").write_text(INSTALLER.format(plugin=plugin))
    for name in ("rdmap32s27", "rdmap16s27"):
        (root / "sys/class/infiniband" / name / "device").mkdir(parents=True)
        (root / "sys/class/infiniband" / name / "device/vendor").write_text(f"{vendor}\n")
    (root / "sys/devices/virtual/dmi/id").mkdir(parents=True)
    (root / "sys/devices/virtual/dmi/id/product_name").write_text("p4d.24xlarge\n")
    (root / "dev/infiniband").mkdir(parents=True)
    for name in ("nvidia0", *(["infiniband/uverbs0"] if verbs else [])):
        (root / "dev" / name).touch()
    return root


def test_a_machine_is_recognised(tmp_path: Path) -> None:
    expected = on(P4D, efa_devices=("rdmap16s27", "rdmap32s27"), plugin=(1, 19, 0), installer=(1, 48, 0))
    assert detect({}, machine(tmp_path / "efa")) == expected
    container = detect({"SM_CURRENT_HOST": "algo-1", "SM_CURRENT_INSTANCE_TYPE": "ml.p4de.24xlarge"}, tmp_path / "efa")
    assert container == on(expected, instance="ml.p4de.24xlarge", sagemaker=True)
    ranks = {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "NCCL_NET_PLUGIN": "none", "SM_NETWORK_INTERFACE_NAME": "e0"}
    found = detect(ranks, tmp_path / "efa")
    assert found == on(expected, several_nodes=True, no_plugin=True, interface="e0")
    assert not detect({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, tmp_path / "efa").several_nodes
    assert detect({"TRAINING_JOB_NAME": "job"}, tmp_path / "efa").sagemaker
    assert not detect({}, machine(tmp_path / "unmapped", verbs=False)).has_verbs
    infiniband = detect({}, machine(tmp_path / "mellanox", vendor="0x15b3"))
    assert infiniband.efa_devices == () and infiniband.has_verbs
    assert detect({}, tmp_path / "nothing") == Platform()
    assert not detect({}, tmp_path / "nothing").efa and detect({"FI_PROVIDER": "efa"}, tmp_path / "nothing").efa


@pytest.mark.parametrize(
    ("named", "listed", "version"),
    [
        ("", "libnccl-ofi-ngc-v3_1.18.0-1_amd64", (1, 18, 0)),
        ("", "libnccl-ofi-1.16.2-1.amzn2023.x86_64", (1, 16, 2)),
        ("", "openmpi40-aws_4.1.7-1_amd64", None),
        ("ofi", "libnccl-ofi_1.19.0-1_amd64", (1, 19, 0)),
        ("/opt/aws-ofi-nccl-1.6.0/lib/libnccl-net.so", "libnccl-ofi_1.19.0-1_amd64", (1, 6, 0)),
        ("/opt/aws-ofi-nccl/v1.9.1-aws/lib/libnccl-net.so", "libnccl-ofi_1.19.0-1_amd64", (1, 9, 1)),
        ("/opt/own/libnccl-net-ofi.so", "libnccl-ofi_1.19.0-1_amd64", None),
    ],
)
def test_version_of_the_plugin(tmp_path: Path, named: str, listed: str, version: tuple[int, ...] | None) -> None:
    assert detect({"NCCL_NET_PLUGIN": named}, machine(tmp_path, plugin=listed)).plugin == version


@pytest.mark.parametrize(
    ("environ", "slurm"),
    [
        ({}, False),
        ({"SLURM_STEP_ID": "0", "LOCAL_WORLD_SIZE": "8"}, True),
        ({"SLURM_STEP_ID": "0", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"SLURM_JOB_ID": "7", "LOCAL_WORLD_SIZE": "8"}, False),
    ],
)
def test_slurm_is_recognised(tmp_path: Path, environ: dict[str, str], slurm: bool) -> None:
    assert detect(environ, tmp_path).slurm == slurm


@pytest.mark.parametrize(
    ("instance", "efa"),
    [
        ("p4de.24xlarge", True),
        ("ml.p5.48xlarge", True),
        ("p6-b200.48xlarge", True),
        ("p3.16xlarge", False),
        ("Standard PC (Q35 + ICH9, 2009)", False),
    ],
)
def test_instances_with_efa(instance: str, efa: bool) -> None:
    assert Platform(instance=instance).efa == efa


def test_it_is_quick_and_imports_no_torch() -> None:
    code = (
        "import os, sys\n"
        "from megatron_atum.launch.environment import prepare\n"
        "prepare(os.environ)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=20)


def test_pretraining_starts_in_it(tmp_path: Path) -> None:
    """Ranks of srun and the policy are known before torch is, are shown by rank 0 alone, and not in a dry run."""
    code = (
        "import sys, pretrain_atum, types\n"
        "run = types.ModuleType('megatron_atum.training.run')\n"
        "def train(config, world_size, rank):\n"
        "    from os import environ\n"
        "    print('ranks', world_size, rank, environ['LOCAL_RANK'], environ['OMP_NUM_THREADS'], *there())\n"
        "    return 0\n"
        "def there():\n"
        "    return ['torch'] if 'torch' in sys.modules else []\n"
        "run.train = train\n"
        "sys.modules[run.__name__] = run\n"
        "sys.exit(pretrain_atum.main())\n"
    )
    slurm = {
        **{"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"},
        **{"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "n[0-1]"},
        "NCCL_BLOCKING_WAIT": "1",
    }

    def call(rank: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": "/usr/bin:/bin", **slurm, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}
        command = [sys.executable, "-c", code, "model.preset=tiny", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)

    first, last = call(0), call(1)
    assert "environment: OMP_NUM_THREADS=1: as torchrun does" in first.stdout, first.stderr
    assert "environment: NCCL_BLOCKING_WAIT=1 was set from outside" in first.stdout
    assert first.stdout.endswith("ranks 4 0 0 1\n") and last.stdout == "ranks 4 1 1 1\n"
    assert "environment" not in call(0, "--dry-run").stdout
