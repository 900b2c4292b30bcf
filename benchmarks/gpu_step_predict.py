"""What a dry run and the cost model say to a run of gpu_step.py. No device is needed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch

from benchmarks.gpu_step_cases import HF, HF_SAVING, Run, Shard
from megatron_atum.config.schema import Config
from megatron_atum.flops import TEXT_LAYERS, Work, products
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.blocks import model_blocks
from megatron_atum.planning.cluster import Cluster, load_cluster
from megatron_atum.planning.cost import Group, stage_seconds
from megatron_atum.planning.dry_run import dry_run
from megatron_atum.planning.traffic import Microbatch

# The built-in cluster with such devices, by a part of the device's name.
CLUSTERS = {"H200": "p5en", "H100 80GB": "p5", "A100-SXM4-80GB": "p4de", "A100-SXM4-40GB": "p4d", "CPU": "laptop"}


@dataclass(frozen=True)
class Prediction:
    """Of a dry run of one step."""

    gib: float
    product_flops: int  # of matrix products without attention


def predict(run: Run) -> Prediction:
    """Plays the run's rank, in a process without accelerators."""
    config = run.config()
    config.training.precision = "bf16"
    rank, world_size = (run.shard.rank, run.shard.world_size) if run.shard else (0, 1)
    world = replace(load_cluster("laptop"), nodes=1, devices_per_node=world_size)
    found = dry_run(config, world, rank, list(run.case.images))
    return Prediction(found.memory.total / 2**30, found.flops["gemm"])


class Predictions:
    """Dry runs of all runs of ours, in processes of their own, beside what this one does."""

    def __init__(self, runs: Sequence[Run], processes: int) -> None:
        """Args: processes: 0: predict nothing."""
        ours = [run for run in runs if run.who not in (HF, HF_SAVING)]
        self._found: dict[str, Future[Prediction]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if processes and ours:
            self._pool = ProcessPoolExecutor(min(processes, len(ours)), get_context("spawn"), _start)
            self._found = {run.name: self._pool.submit(predict, run) for run in ours}

    def wait(self) -> None:
        """Until nothing runs beside this process."""
        for future in self._found.values():
            future.exception()

    def of(self, run: Run) -> tuple[Prediction | None, str | None]:
        """The prediction, or why there is none; neither for what is not predicted."""
        future = self._found.get(run.name)
        if future is None:
            return None, None
        error = future.exception()
        return (future.result(), None) if error is None else (None, f"dry run: {type(error).__name__}: {error}")

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start() -> None:
    hide_accelerators()
    torch.set_num_threads(1)


# A stage of a shard ---------------------------------------------------------------------------------------------------


def stage_flops(config: Config, layout: ParallelLayout, stage: int, images: int) -> float:
    """Model FLOPs of a microbatch on one device of a stage. Args: images: of the microbatch."""
    interval = config.model.cross_layer_interval
    chunks = layout.chunks_of(stage)
    layers = {unit * interval + place for chunk in chunks for unit in chunk.units for place in range(interval)}
    ends = {
        "vision": any(chunk.is_first for chunk in chunks),
        "perceiver": any(chunk.is_first for chunk in chunks),
        "head": any(chunk.is_last for chunk in chunks),
    }
    work = Work(config.training.micro_batch_size, config.data.sequence_length, images)
    mine = (p for p in products(config.model, work) if (p.layer in layers if p.part in TEXT_LAYERS else ends[p.part]))
    return sum(product.model for product in mine) / layout.tensor


def cluster_like(device_name: str) -> Cluster | None:
    """A built-in cluster of this device; None if there is none."""
    return next((load_cluster(name) for part, name in CLUSTERS.items() if part in device_name), None)


def planned_microbatch_s(run: Run, shard: Shard, cluster: Cluster) -> float:
    """Of the cost model, without waiting for other ranks."""
    config, layout = run.config(), run.layout()
    blocks = model_blocks(Microbatch(config, layout, sum(run.case.images)))[shard.stage]
    return stage_seconds(blocks, Group(shard.tensor, shard.tensor), cluster).compute
