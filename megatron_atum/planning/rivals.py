"""The same training without tensor and pipeline parallelism: weights sharded, gathered before use (ZeRO-3 and kin).

Each device computes whole layers on its own rows. It takes all of a step at once and recomputes everything, as the
original did; or, under HSDP, one row after the other without recomputing anything, and then gathers weights again for
each. Schemes differ in where weights are gathered from and gradients reduced to. Weights of a frozen vision tower are
gathered once, since nothing goes back through it; others for the forward and for the backward, which contains the
recomputation, or once more for that.

All of it is a lower bound: rings of hundreds of ranks add latency to each of some hundred collectives of a step, and
the original's step was longer than these parts explain (`explained`). Of memory only what a step begins with is
counted: whether activations fit beside it is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_atum.config.schema import Config
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.blocks import model_blocks
from megatron_atum.planning.cluster import Cluster, load_cluster
from megatron_atum.planning.cost import OPTIMIZER_BYTES, OPTIMIZER_FIXED_S, Group, ring_s, stage_seconds
from megatron_atum.planning.published import (
    IDEFICS_CHECKPOINTS_S,
    IDEFICS_DEVICES,
    IDEFICS_LENGTH,
    IDEFICS_LOG_S,
    IDEFICS_ROWS,
)
from megatron_atum.planning.traffic import GRADIENT_BYTES, Microbatch
from megatron_atum.planning.weights import trainable_values


@dataclass(frozen=True)
class Rival:
    """A step of one scheme. Bytes are on the wire."""

    name: str
    overlaps: bool  # whether communication may run beside products
    network_bytes: float  # out of each node
    node_link_bytes: float  # out of the busiest device to its node
    compute_s: float
    communication_s: float
    optimizer_s: float
    tokens_per_device: float
    state_bytes: float  # of a device: weights, gradients, main weights and moments

    @property
    def shortest_s(self) -> float:
        """With all of the communication behind products, if it may be; no shorter than the longer of the two."""
        if not self.overlaps:
            return self.longest_s
        return max(self.compute_s, self.communication_s) + self.optimizer_s

    @property
    def longest_s(self) -> float:
        """With none of it."""
        return self.compute_s + self.communication_s + self.optimizer_s

    @property
    def tokens_per_s_per_device(self) -> tuple[float, float]:
        """At the longest and at the shortest step."""
        return self.tokens_per_device / self.longest_s, self.tokens_per_device / self.shortest_s


@dataclass(frozen=True)
class _Ring:
    """One way round: an all-gather or a reduce-scatter. An all-reduce is two."""

    bytes: float  # of the whole tensor
    group: Group


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the model."""

    weights: float
    backward: float  # of the weights that are needed in backward
    gradients: float  # fp32
    moments: float  # with main weights

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.moments


@dataclass(frozen=True)
class _Scheme:
    name: str
    rings: list[_Ring]  # of a step
    state: float  # bytes of a device
    overlaps: bool = False
    row_by_row: bool = False  # and nothing recomputed


def rivals(config: Config, cluster: Cluster, images_per_row: float) -> list[Rival]:
    """Model and batch of `config` under each scheme."""
    rows = math.ceil(config.training.global_batch_size / cluster.world_size)
    whole = _microbatch(config, cluster, images_per_row, rows, "full")
    single = _microbatch(config, cluster, images_per_row, 1, "none")
    compute = {
        False: stage_seconds(model_blocks(whole)[0], Group(1, 1), cluster).total,
        True: rows * stage_seconds(model_blocks(single)[0], Group(1, 1), cluster).total,
    }
    (weights,) = whole.weights
    vision = sum(w.values for w in weights if w.name.startswith("vision.")) if config.model.freeze.vision else 0
    every, trainable = sum(w.values for w in weights), trainable_values(weights)
    sizes = _Sizes(whole.item * every, whole.item * (every - vision), GRADIENT_BYTES * trainable, 12 * trainable)
    values = trainable / cluster.world_size
    optimizer = values * OPTIMIZER_BYTES / cluster.device.memory_bytes_per_s + OPTIMIZER_FIXED_S
    tokens = config.training.global_batch_size * config.data.sequence_length / cluster.world_size
    return [
        _rival(scheme, cluster, compute[scheme.row_by_row], optimizer, tokens)
        for scheme in _schemes(sizes, cluster, rows)
    ]


def _microbatch(config: Config, cluster: Cluster, images_per_row: float, rows: int, recompute: str) -> Microbatch:
    """Of one device that has the whole model."""
    units = config.model.num_layers // config.model.cross_layer_interval
    layout = ParallelLayout(cluster.world_size, units_per_chunk=(units,))
    training = replace(
        config.training,
        micro_batch_size=rows,
        recompute=recompute,
        recompute_method="uniform",
        recompute_layers=1,
    )
    return Microbatch(replace(config, training=training), layout, rows * images_per_row)


def _schemes(sizes: _Sizes, cluster: Cluster, rows: int) -> list[_Scheme]:
    """The original ran the first or second, without overlap (overlap_comm=false)."""
    per_node = cluster.devices_per_node
    world = Group(cluster.world_size, per_node)
    node = Group(per_node, per_node)
    across = Group(cluster.nodes, 1)  # one device of each node
    forward, backward = _Ring(sizes.weights, world), _Ring(sizes.backward, world)
    reduced = _Ring(sizes.gradients, world)
    gathers = [_Ring(sizes.weights, node), _Ring(sizes.backward, node)]
    inside, shard = _Ring(sizes.gradients, node), _Ring(sizes.gradients / per_node, across)
    half_inside, half = (_Ring(ring.bytes / 2, ring.group) for ring in (inside, shard))
    of_all, of_node = sizes.state / cluster.world_size, sizes.state / per_node  # gradients are kept in fp32 also then
    return [
        _Scheme("ZeRO-3, 2 gathers", [forward, backward, reduced], of_all),
        _Scheme("ZeRO-3, 3 gathers", [forward, backward, backward, reduced], of_all),
        _Scheme("hpZ (ZeRO++)", [forward, gathers[1], reduced], of_all + sizes.weights / per_node),
        _Scheme("HSDP, fp32 gradients", [*gathers, inside, shard, shard], of_node, overlaps=True),
        _Scheme("HSDP, bf16 gradients", [*gathers, half_inside, half, half], of_node, overlaps=True),
        _Scheme(
            "HSDP, bf16 gradients, row by row",  # also where a device has one row: nothing recomputed
            [*rows * [*gathers, half_inside], half, half],
            of_node,
            overlaps=True,
            row_by_row=True,
        ),
    ]


def _rival(scheme: _Scheme, cluster: Cluster, compute: float, optimizer: float, tokens: float) -> Rival:
    network = node_link = seconds = 0.0
    for ring in scheme.rings:
        group = ring.group
        sent = (group.size - 1) / group.size * ring.bytes
        if group.per_node < group.size:
            network += sent * cluster.devices_per_node / group.per_node
        if group.per_node > 1:
            node_link += sent
        seconds += ring_s(ring.bytes, group, cluster)
    return Rival(scheme.name, scheme.overlaps, network, node_link, compute, seconds, optimizer, tokens, scheme.state)


@dataclass(frozen=True)
class Explained:
    """A prediction for the original's run, and what of its measured step it leaves unexplained."""

    scheme: str
    source: str  # of the measurement
    predicted_s: float
    measured_s: float

    @property
    def rest_s(self) -> float:
        return self.measured_s - self.predicted_s

    @property
    def text(self) -> str:
        share = 100 * self.rest_s / self.measured_s
        return (
            f"{self.scheme}: {self.predicted_s:.1f} s predicted, {self.measured_s:.1f} s measured ({self.source}); "
            f"{self.rest_s:.1f} s ({share:.0f} %) unexplained"
        )


MEASURED = {"its log": IDEFICS_LOG_S, "its checkpoints": IDEFICS_CHECKPOINTS_S}


def explained(config: Config, cluster: Cluster, images_per_row: float) -> list[Explained]:
    """The original's run beside what is predicted for it; empty for another model, batch or hardware."""
    run = (config.training.global_batch_size, config.data.sequence_length, cluster.world_size)
    theirs = load_cluster("p4de")
    if config.model.preset != "atum-80b" or run != (IDEFICS_ROWS, IDEFICS_LENGTH, IDEFICS_DEVICES):
        return []
    if (cluster.device, cluster.network) != (theirs.device, theirs.network):
        return []
    return [
        Explained(rival.name, source, rival.longest_s, measured)
        for rival in rivals(config, cluster, images_per_row)[:2]
        for source, measured in MEASURED.items()
    ]
