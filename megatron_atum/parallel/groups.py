"""Process groups of a layout. The only place that initialises megatron-core's parallel state."""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_atum.errors import ConfigError
from megatron_atum.parallel.cpu_compat import emulated_cuda, install_cpu_rng
from megatron_atum.parallel.device import backend, device
from megatron_atum.parallel.fake import host_backend, is_fake
from megatron_atum.parallel.layout import Chunk, ParallelLayout
from megatron_atum.parallel.limits import allow_connections


@dataclass(frozen=True)
class ProcessGroups:
    """This process's place in a layout and the groups it communicates in."""

    layout: ParallelLayout
    rank: int
    pipeline_rank: int
    data_rank: int
    tensor_rank: int
    tensor: dist.ProcessGroup
    data: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    host: dist.ProcessGroup  # all ranks, over gloo: for the thread that reads data (training/feed.py), and it alone
    control: dist.ProcessGroup  # the same for the training thread, where what is said is no tensor of the device
    collection: ProcessGroupCollection  # what megatron-core's modules take
    alone: ProcessGroupCollection  # the same with a tensor group of this rank only, for modules that are not split

    @property
    def chunks(self) -> list[Chunk]:
        return self.layout.chunks_of(self.pipeline_rank)

    @property
    def kinds(self) -> dict[str, str]:
        """What the groups of this rank are for, by their names in torch."""
        c = self.collection
        by_kind = {"model": [c.mp], "data": [c.dp_cp, c.dp], "pipeline": [c.pp], "tensor": [c.tp]}
        by_kind |= {"world": [dist.group.WORLD], "host": [self.host], "control": [self.control]}
        return {group.group_name: kind for kind, groups in by_kind.items() for group in groups}

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline - 1


TIMEOUT_S = 600.0  # of a collective, in every group


def set_timeout(timeout_s: float) -> None:
    """Collectives of all groups of this process that begin from here on fail after so many seconds."""
    if is_fake():  # nothing there can be late
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s), group)


def keep_flight_record(folder: Path) -> None:
    """NCCL's watchdog writes the last collectives of each rank there when one times out. Before groups exist.

    Raises:
        ConfigError: the folder cannot be made.
    """
    if not torch.cuda.is_available():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error}); set logging.root to a folder that can") from None
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    settings = {
        ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",  # 0 would record nothing
        ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"): str(folder / "nccl-flight-record-rank-"),
    }
    # All names of torch 2.9 and later begin with TORCH_FR. It knows the older ones too, and warns of them.
    older = torch.__version__ < "2.9.0a0"
    for names, value in settings.items():
        if not any(name in os.environ for name in names):  # else the user's value would not count
            os.environ[names[older]] = value


def start_distributed(timeout_s: float = TIMEOUT_S) -> None:
    """Join the default process group from torchrun's environment (a single process needs no environment).

    Raises:
        ConfigError: this process may not open as many files as there are connections.
    """
    if dist.is_initialized():
        return
    allow_connections(int(os.environ.get("WORLD_SIZE", "1")))
    # One hardware queue keeps tensor-parallel communication in the order in which it was issued; read when the
    # device is first used.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    timeout = datetime.timedelta(seconds=timeout_s)
    if "RANK" in os.environ:
        dist.init_process_group(backend(), timeout=timeout)
    else:
        dist.init_process_group(backend(), timeout=timeout, rank=0, world_size=1, store=dist.HashStore())


def build_groups(layout: ParallelLayout, seed: int = 1, timeout_s: float = TIMEOUT_S) -> ProcessGroups:
    """Create the groups of a layout. Collective over all ranks; the default process group must exist."""
    timeout = datetime.timedelta(seconds=timeout_s)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
    )
    install_cpu_rng()
    with emulated_cuda():
        model_parallel_cuda_manual_seed(seed)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    alone = ProcessGroupCollection.use_mpu_process_groups()
    alone.tp = collection.cp  # context parallelism is not used, so its group holds this rank only
    rank = dist.get_rank()
    pipeline_rank, data_rank, tensor_rank = layout.coordinates(rank)
    groups = ProcessGroups(
        layout=layout,
        rank=rank,
        pipeline_rank=pipeline_rank,
        data_rank=data_rank,
        tensor_rank=tensor_rank,
        tensor=collection.tp,
        data=collection.dp,
        pipeline=collection.pp,
        host=dist.new_group(backend=host_backend(), timeout=timeout),
        control=dist.new_group(backend=host_backend(), timeout=timeout),
        collection=collection,
        alone=alone,
    )
    _check_coordinates(groups)
    set_timeout(timeout_s)  # megatron-core takes whole minutes
    return groups


def stop_distributed() -> None:
    """Leave all groups. Not for error paths: it would wait for ranks that are gone."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check_coordinates(groups: ProcessGroups) -> None:
    """Our documented rank order must be the one megatron-core uses."""
    place = (groups.pipeline.rank(), groups.data.rank(), groups.tensor.rank())
    assert place == (groups.pipeline_rank, groups.data_rank, groups.tensor_rank), place
