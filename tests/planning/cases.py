"""Small layouts for four ranks, trained for real over gloo and played as single ranks: what both are compared by."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.parallel.cpu_compat import emulated_cuda
from megatron_atum.parallel.device import hide_accelerators
from megatron_atum.parallel.groups import build_groups
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import Cluster, load_cluster
from megatron_atum.planning.dry_run import DryRun, dry_run, kind_of
from megatron_atum.planning.recorder import Recorder
from megatron_atum.training.engine import Engine
from megatron_atum.training.self_check import full_batch

IMAGES = [3, 2]  # of the rows of a microbatch: an odd number over two tensor ranks
PLAYED = (0, 3)  # ranks: the ends of the pipeline, and both tensor ranks
SMALL = [
    "model.preset=tiny",
    "data.sequence_length=32",
    "data.sources=[{name: a, shards: x}]",
    "training.micro_batch_size=2",
    "training.global_batch_size=12",  # fewest microbatches, at least one more than a dry run plays of each layout
    "training.precision=fp32",
    "optimizer.overlap_param_gather=false",
]
FROZEN = "model.freeze={text: true, vision: true, lm_head: true}"
LAYOUTS = {
    "tensor and pipeline, frozen": ["parallel.tensor=2", "parallel.pipeline=2", FROZEN],
    "all train, nothing overlapped": [
        *("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=false"),
        "optimizer.overlap_grad_reduce=false",
    ],
    "interleaved": ["parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    "interleaved, recomputed": [
        *("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
        *("training.recompute=full", FROZEN),
    ],
    "two layers recomputed together": [
        *("parallel.tensor=2", "model.cross_layer_interval=2", "training.recompute=full"),
        *("training.recompute_layers=3", "optimizer.overlap_param_gather=true"),
    ],
    "buckets": ["parallel.tensor=2", "parallel.sequence=false", "optimizer.bucket_size=20000"],
    "plain optimizer": ["parallel.pipeline=2", "optimizer.distributed=false", "training.global_batch_size=16"],
    "selective": ["parallel.tensor=4", "training.recompute=selective", FROZEN],
    "frozen in 8 bits": [
        *("parallel.tensor=2", "parallel.pipeline=2", "training.recompute=selective"),
        *("kernels.frozen_gemm=fp8", FROZEN),
    ],
}
EIGHT = ("parallel.tensor=8", "training.micro_batch_size=4")  # the 80B recipe in another form, for hand counts
Key = tuple[str, str]  # group and operation


@dataclass(frozen=True)
class RealRun:
    """What one rank did in a step."""

    calls: dict[Key, int]
    payload: dict[Key, int]
    flops: dict[str, int]


def config_of(name: str, *overrides: str) -> Config:
    return load_config(None, [*SMALL, *LAYOUTS[name], *overrides])


def laptop(nodes: int, devices: int) -> Cluster:
    return replace(load_cluster("laptop"), nodes=nodes, devices_per_node=devices)


def play(
    rank: int,
    world_size: int,
    config: Config,
    cluster: Cluster,
    ranks: list[int],
    images: list[int] = IMAGES,
    microbatches: int | None = None,
) -> list[DryRun]:
    """For `run_distributed` with one process, since dry runs need the default group for themselves."""
    hide_accelerators()
    if dist.is_initialized():
        dist.destroy_process_group()
    return [dry_run(config, cluster, one, images, microbatches) for one in ranks]


def play_all(rank: int, world_size: int) -> dict[str, list[DryRun]]:
    return {name: play(rank, world_size, config_of(name), laptop(2, 2), list(PLAYED)) for name in LAYOUTS}


def train_all(rank: int, world_size: int) -> dict[str, RealRun]:
    return {name: _second_step(config_of(name), world_size) for name in LAYOUTS}


def _second_step(config: Config, world_size: int) -> RealRun:
    """What a dry run plays of it: all but the norm of the gradients and the exchange of losses."""
    groups = build_groups(ParallelLayout.from_config(config, world_size))
    engine = Engine(config, groups)
    torch.manual_seed(0)
    for stage in engine.stages:
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    engine.build_optimizer()
    engine.cast_frozen()
    rows = config.training.micro_batch_size * groups.layout.data
    batches = [full_batch(config, groups, IMAGES)] * (config.training.global_batch_size // rows)
    engine.step(batches[:2])  # the first makes the optimizer's state; the schedules want a multiple of the stages
    prepared = engine.prepare(batches)
    recorder = Recorder()
    with recorder, emulated_cuda():
        engine.run(*prepared)
        engine.optimizer.prepare_grads()
        engine.optimizer.step_with_ready_grads()
    calls: Counter[Key] = Counter()
    payload: Counter[Key] = Counter()
    for transfer, number in recorder.calls.items():
        key = (kind_of(transfer, groups), transfer.operation)
        calls[key] += number
        payload[key] += recorder.payload[transfer]
    return RealRun(dict(calls), dict(payload), {kind: count for (_, kind), count in recorder.flops.items()})


def by_kind(run: DryRun, value: str) -> dict[Key, int]:
    found: Counter[Key] = Counter()
    for message in run.messages:
        found[message.group, message.operation] += getattr(message, value)
    return dict(found)
