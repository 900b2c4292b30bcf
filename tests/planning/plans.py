"""Small plans without dry runs: what a device needs is made up, in GiB that can be added by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.planning import memory
from megatron_atum.planning.cluster import Cluster, load_cluster
from megatron_atum.planning.memory import Part, Parts
from megatron_atum.planning.plan import Images, Planner

GIB = 2**30
RESERVED = 6.0  # GiB of each device
IMAGES = Images(2.5, 8)  # of a row: mean and most
SMALL = [
    "model.preset=tiny",
    "data.sequence_length=64",
    "data.sources=[{name: pairs, shards: x}]",
    "training.micro_batch_size=2",
    "training.global_batch_size=24",
]


def config_of(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def cluster_of(nodes: int, devices: int, memory_gib: float = 1000.0) -> Cluster:
    laptop = load_cluster("laptop")
    device = replace(laptop.device, memory_gib=memory_gib, reserved_gib=RESERVED)
    return replace(laptop, nodes=nodes, devices_per_node=devices, device=device)


def planner(config: Config, cluster: Cluster, images: Images = IMAGES) -> Planner:
    return Planner(config, cluster, images)


def made_up(config: Config, cluster: Cluster, tensor: int, images: tuple[int, ...]) -> Parts:
    """Of each of the four units 1 GiB of weights, 1 of gradients, 2 of moments and 1 for each row under way; the first
    stage keeps 1 for each image. Tensor ranks share everything."""
    one = GIB // tensor
    unit = Part(one, one, 2 * one, len(images) * one)
    return Parts(
        Part(kept=sum(images) * one), unit, Part(), passing=(0, 0, 0), inputs=(0, 0, 0), entry=Part(), unreached=()
    )


def make_up_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure_parts", made_up)
