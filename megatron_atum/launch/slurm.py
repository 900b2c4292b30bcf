"""Ranks that srun starts itself, one task each, under the names that torch.distributed reads.

    srun --nodes 2 --ntasks-per-node 8 python pretrain_atum.py --config my.yaml

Only variables of the task are read: the nodes of a container have no Slurm programs to ask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from megatron_atum.errors import ConfigError

# Ids from here on are those of batch scripts and of interactive shells. Both have a SLURM_PROCID, and are no rank.
_SPECIAL_STEPS = 0xFFFF_FFF0
# Below the ports that Linux gives to outgoing connections (32768 and up), above those of services.
_FIRST_PORT, _PORTS = 16384, 16384


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of srun.

    LOCAL_RANK chooses the GPU. Where srun shows each task one GPU only (--gpus-per-task, --gpu-bind), which is when
    CUDA_VISIBLE_DEVICES has one entry, that GPU is number 0, and so is LOCAL_RANK. MASTER_ADDR and MASTER_PORT that
    are set already stay.

    Args:
        environ: of this process.

    Returns:
        Empty if srun did not start this process, or if it has a RANK already, as torchrun's workers have. One that
        enroot's hook has set (50-slurm-pytorch.sh, in images with PyTorch) is completed.

    Raises:
        ConfigError: Slurm's variables contradict each other, as they do where some are left over from another job.
    """
    if not _is_task(environ) or ("RANK" in environ and not _is_of_a_hook(environ)):
        return {}
    rank, size = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NTASKS")
    local_rank, local_size = _number(environ, "SLURM_LOCALID"), _local_size(environ, size)
    if rank >= size:
        raise _contradiction(f"SLURM_PROCID={rank}, but SLURM_NTASKS={size}")
    if local_rank >= local_size:
        raise _contradiction(f"SLURM_LOCALID={local_rank}, but there are {local_size} tasks on this node")
    sees_one_gpu = bool(re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")))
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if sees_one_gpu else str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(_nodes(environ)),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(environ)),
    }


def first_host(nodelist: str) -> str:
    """`node[001-004,7],gpu-a[3]` -> `node001`. It has rank 0, as srun deals tasks out in the order of the list."""
    name = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+(?=,|$)", nodelist.strip())
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", name.group()) if name else ""
    if not host or set(host) & set("[]"):
        raise ConfigError(
            f"no host can be read from SLURM_JOB_NODELIST={nodelist!r}; set MASTER_ADDR to that of rank 0"
        )
    return host


def port_of(job: int, step: int, restart: int) -> int:
    """Where rank 0 listens. Jobs that share a host are near each other in number, so their ports differ; as do those of
    steps side by side, and that of a start after one whose port was taken."""
    return _FIRST_PORT + (job + 499 * step + 1999 * restart) % _PORTS


def _port(environ: Mapping[str, str]) -> int:
    restart = _number(environ, "SLURM_RESTART_COUNT") if environ.get("SLURM_RESTART_COUNT") else 0
    return port_of(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID"), restart)


def _is_task(environ: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return False
    return _number(environ, "SLURM_STEP_ID") < _SPECIAL_STEPS and _number(environ, "SLURM_NTASKS") > 0


def _is_of_a_hook(environ: Mapping[str, str]) -> bool:
    """It numbers ranks as srun does, and knows no LOCAL_WORLD_SIZE."""
    same = environ.get("RANK") == environ["SLURM_PROCID"] and environ.get("WORLD_SIZE") == environ["SLURM_NTASKS"]
    return same and "LOCAL_WORLD_SIZE" not in environ


def _local_size(environ: Mapping[str, str], size: int) -> int:
    """Tasks on this node."""
    of_nodes = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if of_nodes is None:
        return _number(environ, "SLURM_NTASKS_PER_NODE")
    tasks = _tasks_of_nodes(of_nodes)
    if sum(tasks) != size:
        raise _contradiction(f"SLURM_STEP_TASKS_PER_NODE={of_nodes} makes {sum(tasks)} tasks, but SLURM_NTASKS={size}")
    node = _number(environ, "SLURM_NODEID") if len(tasks) > 1 else 0
    if node >= len(tasks):
        raise _contradiction(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={of_nodes} is of {len(tasks)} nodes")
    return tasks[node]


def _tasks_of_nodes(text: str) -> list[int]:
    """`8(x3),4` -> [8, 8, 8, 4]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise _contradiction(f"SLURM_STEP_TASKS_PER_NODE={text} cannot be read")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _nodes(environ: Mapping[str, str]) -> str:
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.isdecimal():
        raise _contradiction(f"{name} is {'not set' if value is None else repr(value)}")
    return int(value)


def _contradiction(what: str) -> ConfigError:
    return ConfigError(
        f"{what}, so the rank of this process is not known; start it by srun in the job that it belongs to, or set "
        "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT yourself"
    )
