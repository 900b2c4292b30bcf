"""Which variables of NCCL, EFA and torch a process runs with, by platform; `POLICY` is all of it.

    for note in prepare(os.environ):    # before torch is imported
        print(note)

What the user has set stays. SageMaker's training toolkit forces some variables on every job; with its own value they
are removed, unless the job's environment has them too (launch/sagemaker.py). Names in ATUM_KEEP_ENV, separated by
commas, are left alone altogether. Imports no torch.

Sources: [EFA] AWS's efa-cheatsheet.md (github.com/aws-samples/awsome-distributed-training, 1.architectures);
[toolkit] torch_distributed.py of sagemaker-training 5.1.4; [torch] ProcessGroupNCCL.hpp of torch 2.13; [plugin]
nvidia_plugin_name_fixup of aws-ofi-nccl, and the plug-in's name up to 1.11.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_atum.launch.sagemaker import KEEPS as OF_THE_JOB

KEEP = "ATUM_KEEP_ENV"
EFA_PACKAGES = Path("opt/amazon/efa_installed_packages")  # as the EFA installer writes it
EFA_INSTANCES = re.compile(r"(ml\.)?(p4d|p4de|p5|p5e|p5en|p6[a-z0-9-]*)\.\w+")
AMAZON = "0x1d0f"  # PCI vendor

Version = tuple[int, ...]


@dataclass(frozen=True)
class Platform:
    """Where this process runs."""

    instance: str = ""  # EC2's type, p4d.24xlarge
    gpus: bool = False
    efa_devices: tuple[str, ...] = ()  # as the kernel names them
    has_verbs: bool = False  # /dev/infiniband, through which they are used, is there too
    asks_for_efa: bool = False  # FI_PROVIDER=efa came from outside
    several_nodes: bool = False
    no_plugin: bool = False  # NCCL_NET_PLUGIN=none came from outside
    sagemaker: bool = False
    interface: str = ""  # of the network, as SageMaker names it
    slurm: bool = False  # srun started this rank and others on this node
    plugin: Version | None = None  # of aws-ofi-nccl, where it can be found out
    installer: Version | None = None  # of EFA's installer

    @property
    def efa(self) -> bool:
        """Whether there is EFA, or should be."""
        return bool(self.efa_devices) or self.asks_for_efa or bool(EFA_INSTANCES.fullmatch(self.instance))

    def plugin_before(self, *version: int) -> bool:
        return self.plugin is not None and self.plugin < version


@dataclass(frozen=True)
class Setting:
    """A row of the policy: what is done about a variable, where, and why."""

    does: str  # set: unless it is set; remove: if it has this value; warn: if it has any other than this value
    name: str  # for warn also a pattern
    value: str  # {interface} is the platform's
    where: Callable[[Platform], bool]
    why: str
    older_name: str = ""  # under which the user may have set it


def _on_efa(platform: Platform) -> bool:
    return platform.efa


def _on_gpus(platform: Platform) -> bool:
    return platform.gpus


def _between_nodes(platform: Platform) -> bool:
    return platform.efa and platform.several_nodes


def _everywhere(_: Platform) -> bool:
    return True


_PROTO = "only aws-ofi-nccl up to 1.5 needs it, and it switches NCCL's low-latency protocols off [EFA]"

POLICY = (
    Setting(
        "remove",
        "NCCL_PROTO",
        "simple",
        lambda p: p.sagemaker and not p.plugin_before(1, 6),
        _PROTO,
    ),
    Setting(
        "remove",
        "RDMAV_FORK_SAFE",
        "1",
        lambda p: p.sagemaker,
        "AWS says not to use it: it can break things on newer kernels [EFA]",
    ),
    Setting(
        "remove",
        "FI_EFA_USE_DEVICE_RDMA",
        "1",
        lambda p: p.sagemaker and not p.plugin_before(1, 7),
        "aws-ofi-nccl from 1.7 on decides it by itself [EFA]",
    ),
    Setting(
        "set",
        "FI_PROVIDER",
        "efa",
        _on_efa,
        "libfabric must not offer NCCL its TCP provider where EFA does not work [EFA]",
    ),
    Setting(
        "set",
        "NCCL_NET",
        "AWS Libfabric",
        lambda p: p.several_nodes and bool(p.efa_devices) and p.has_verbs and not p.no_plugin,
        "NCCL must end where its plug-in for EFA is missing or fails, not go over TCP; every version of the plug-in "
        "answers to this name [plugin]",
    ),
    Setting(
        "set",
        "NCCL_SOCKET_IFNAME",
        "^lo,docker,veth",
        _between_nodes,
        "NCCL must not start its connections at bridges of containers [EFA]",
    ),
    Setting(
        "set",
        "GLOO_SOCKET_IFNAME",
        "{interface}",
        lambda p: bool(p.interface),
        "gloo takes the address of the host's own name, which in SageMaker's containers may be that of the loopback",
    ),
    Setting(
        "set",
        "FI_EFA_USE_HUGE_PAGE",
        "0",
        _on_efa,
        "data workers are forked, and with huge pages fork() fails for lack of memory [EFA]",
    ),
    Setting(
        "set",
        "FI_EFA_USE_DEVICE_RDMA",
        "1",
        lambda p: p.efa and p.plugin_before(1, 7),
        "aws-ofi-nccl before 1.7 uses GPUDirect only when asked [EFA]",
    ),
    Setting(
        "set",
        "FI_EFA_SET_CUDA_SYNC_MEMOPS",
        "0",
        lambda p: p.efa and p.installer is not None and p.installer < (1, 29, 1),
        "before EFA installer 1.29.1 memory cannot be registered otherwise [EFA]",
    ),
    Setting(
        "set",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "3",
        _on_gpus,
        "a collective that fails or is late ends the process, without waiting for NCCL's own clean-up, which may hang "
        "[torch]",
        older_name="NCCL_ASYNC_ERROR_HANDLING",
    ),
    Setting(
        "set",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC",
        "3600",
        _on_gpus,
        "torch's own monitor must not end a rank before health.start_timeout_s and step_timeout_s, whose message says "
        "which rank to look at [torch]",
    ),
    Setting(
        # parallel/groups.py does the same for programs that do not call `prepare`.
        "set",
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "1",
        _on_gpus,
        "tensor and sequence parallelism rely on kernels that start in the order in which they were issued "
        "(megatron-core, tensor_parallel/layers.py)",
    ),
    Setting(
        "set",
        "OMP_NUM_THREADS",
        "1",
        lambda p: p.slurm,
        "as torchrun does; by default each rank would start a thread for every core",
    ),
    Setting(
        "warn",
        "NCCL_PROTO",
        "",
        lambda p: p.efa and not p.plugin_before(1, 6),
        _PROTO,
    ),
    Setting("warn", "RDMAV_*", "", _on_efa, "AWS says not to use RDMAV variables [EFA]"),
    Setting("warn", "NCCL_BUFFSIZE", "", _on_efa, "AWS recommends NCCL's default [EFA]"),
    Setting(
        "warn",
        "NCCL_ASYNC_ERROR_HANDLING",
        "",
        _everywhere,
        "an old name; use TORCH_NCCL_ASYNC_ERROR_HANDLING [torch]",
    ),
    Setting(
        "warn",
        "*NCCL_BLOCKING_WAIT",
        "0",
        _everywhere,
        "with it torch switches asynchronous error handling off [torch]",
    ),
)


def prepare(environ: MutableMapping[str, str], platform: Platform | None = None) -> list[str]:
    """Apply `POLICY`.

    Args:
        environ: is changed.
        platform: what `detect` finds.

    Returns:
        lines that this rank shows. Rank 0: what was set or removed, what of the user's is left as it is, and why; the
        first rank of each node what no variable can mend there.
    """
    platform = detect(environ) if platform is None else platform
    kept = [name.strip() for name in environ.get(KEEP, "").split(",") if name.strip()]
    lines = [line for row in POLICY if row.where(platform) for line in _apply(row, environ, kept, platform)]
    for name in kept:
        if not any(fnmatchcase(name, setting.name) for setting in POLICY):
            lines.append(f"{KEEP} names {name}, which is never touched")
    lines = lines if environ.get("RANK", "0") == "0" else []
    remarks = [f"{socket.gethostname()}: {remark}" for remark in _remarks(platform)]
    return lines + (remarks if environ.get("LOCAL_RANK", "0") == "0" else [])


def _apply(setting: Setting, environ: MutableMapping[str, str], kept: list[str], platform: Platform) -> list[str]:
    if setting.does == "warn":
        found = [name for name in sorted(environ) if fnmatchcase(name, setting.name) and name not in kept]
        return [
            f"{name}={environ[name]} was set from outside and stays, but: {setting.why}"
            for name in found
            if environ[name] != setting.value
        ]
    if setting.name in kept:
        return []
    value = environ.get(setting.name)
    if setting.does == "remove":
        is_of_toolkit = value == setting.value and OF_THE_JOB + setting.name not in environ
        return _remove(setting, environ, platform) if is_of_toolkit else []
    wanted = setting.value.format(interface=platform.interface)
    if value is None and setting.older_name in environ:
        return []  # said by its own row
    if value is None:
        environ[setting.name] = wanted
        return [f"{setting.name}={wanted}: {setting.why}"]
    return [] if value == wanted else [f"{setting.name}={value} was set from outside and stays, instead of {wanted}"]


def _remove(setting: Setting, environ: MutableMapping[str, str], platform: Platform) -> list[str]:
    del environ[setting.name]
    return [
        f"{setting.name}={setting.value} of the SageMaker toolkit removed: {setting.why}; aws-ofi-nccl's version is "
        f"{dotted(platform.plugin)}, {KEEP}={setting.name} would keep it"
    ]


def _remarks(platform: Platform) -> list[str]:
    """What no variable can mend."""
    remarks = []
    if platform.plugin_before(1, 6) and platform.efa:
        remarks.append(f"aws-ofi-nccl {dotted(platform.plugin)} is too old to run without NCCL_PROTO=simple: update it")
    if not platform.several_nodes:
        return remarks
    if platform.efa and not platform.efa_devices:
        remarks.append(
            "no EFA device is in /sys/class/infiniband: between nodes NCCL can only use TCP. All EFA interfaces must "
            "be attached when the instance is launched"
        )
    elif platform.efa_devices and not platform.has_verbs:
        remarks.append(
            "there are EFA devices, but no /dev/infiniband/uverbs*: between nodes NCCL can only use TCP. Start the "
            "container with --device=/dev/infiniband"
        )
    return remarks


def detect(environ: MutableMapping[str, str], root: Path = Path("/")) -> Platform:
    """Args: root: of the file system."""
    packages = read_text(root / EFA_PACKAGES)
    return Platform(
        instance=environ.get("SM_CURRENT_INSTANCE_TYPE")
        or read_text(root / "sys/devices/virtual/dmi/id/product_name").strip(),
        gpus=any((root / "dev").glob("nvidia[0-9]*")),
        efa_devices=_efa_devices(root / "sys/class/infiniband"),
        has_verbs=any((root / "dev/infiniband").glob("uverbs*")),
        asks_for_efa=environ.get("FI_PROVIDER") == "efa",
        several_nodes=_number(environ, "WORLD_SIZE") > _number(environ, "LOCAL_WORLD_SIZE"),
        no_plugin=environ.get("NCCL_NET_PLUGIN") == "none",
        interface=environ.get("SM_NETWORK_INTERFACE_NAME", ""),
        sagemaker="SM_CURRENT_HOST" in environ or "TRAINING_JOB_NAME" in environ,
        slurm="SLURM_STEP_ID" in environ and environ.get("LOCAL_WORLD_SIZE", "1") != "1",
        plugin=_plugin_version(environ.get("NCCL_NET_PLUGIN", ""), packages),
        installer=version_in(packages, r"EFA installer version: *"),
    )


def _number(environ: MutableMapping[str, str], name: str) -> int:
    """Of ranks. A launcher that tells no LOCAL_WORLD_SIZE starts one on each node."""
    value = environ.get(name, "1")
    return int(value) if value.isdecimal() else 1


def _efa_devices(folder: Path) -> tuple[str, ...]:
    """Of all RDMA devices those of Amazon."""
    vendors = {file.parent.parent.name: read_text(file).strip() for file in folder.glob("*/device/vendor")}
    return tuple(sorted(name for name, vendor in vendors.items() if vendor == AMAZON))


def _plugin_version(named: str, packages: str) -> Version | None:
    """From the path that NCCL_NET_PLUGIN names, else from the installer's list (libnccl-ofi_1.16.2-1_amd64).

    A name that is no path says nothing, and a path without a version is not the installer's plug-in.
    """
    if "/" in named:
        return version_in(named, r"ofi-nccl[-_/]v?")
    return version_in(packages, r"libnccl-ofi[a-z0-9-]*?[-_]v?")


def version_in(text: str, before: str) -> Version | None:
    found = re.search(rf"{before}(\d+(?:\.\d+)+)", text)
    return tuple(map(int, found[1].split("."))) if found else None


def dotted(version: Version | None) -> str:
    return ".".join(map(str, version)) if version else "unknown"


def read_text(file: Path) -> str:
    """Empty where there is no such file, or it may not be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
