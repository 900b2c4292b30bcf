"""How long a step takes, from what it computes and moves. Knows clusters and pipelines, but no model.

First order, and the same for every model:

- A matrix product takes its FLOPs over peak x efficiency. Elementwise work takes the bytes it moves over the bandwidth
  of the device's memory, and each kernel its launch. They do not overlap.
- A collective of n ranks is a ring: (n-1)/n of its tensor over the slowest link, an all-reduce twice that. A ring
  leaves each node once, so groups with several ranks on a node put fewer bytes on the network.
- One-forward-one-backward, of which the slowest stage sets the pace: all microbatches go through it, and one through
  the others, which is the filling and draining of the pipe, divided by the chunks of a stage if they interleave.
  Source: Narayanan et al., arXiv 2104.04473, section 2.2, for equal stages.
- megatron-core's plain schedule waits for each exchange between stages; the interleaved one hides it behind a chunk's
  products, save while the pipe fills and drains (pipeline_parallel/schedules.py of 0.16.1).
- Reduction of gradients and gathering of parameters hide by a share, at most behind one backward and one forward.

Left out: stragglers and jitter, microbatches that differ (in images above all), data loading, host time, the slowing of
products beside communication, and that small products (few rows, many tensor ranks) reach less of the peak. So expect
a step to be a little longer. `published.py` and `measured.py` compare with measurements; the values of constants are
not fitted to them. One term was added after a look at the errors: see there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_atum.planning.cluster import Cluster, Link

# Assumed: on the first stage one backward has a bucket for every few layers, and the first and last of them hide behind
# nothing; later stages have one bucket, and time to hide it while the pipe drains.
DATA_OVERLAP = 0.7
# Bytes that the optimizer moves for each value: gradient norm 4, clipping 8, Adam over gradient, weight and two moments
# in fp32 28, cast to bf16 6 (counted from megatron-core's DistributedOptimizer with Adam in one kernel).
OPTIMIZER_BYTES = 46
OPTIMIZER_FIXED_S = 0.05  # assumed: its small reductions, host synchronisation and loops over parameters


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, as they lie on the nodes."""

    size: int
    per_node: int  # most of them on one node

    @classmethod
    def of(cls, ranks: Sequence[int], cluster: Cluster) -> Group:
        nodes = [cluster.node_of(rank) for rank in ranks]
        return cls(len(nodes), max(nodes.count(node) for node in set(nodes)))

    def link(self, cluster: Cluster) -> Link:
        """What one rank sees while all groups of its kind talk at once and share the network of their nodes."""
        if self.per_node == self.size:
            return cluster.node_link
        share = cluster.network.bytes_per_s * self.per_node / cluster.devices_per_node
        return Link(min(share, cluster.node_link.bytes_per_s), cluster.network.latency_s)


@dataclass(frozen=True)
class Collective:
    """Of the tensor-parallel group, for one microbatch."""

    kind: str  # all_gather | reduce_scatter | all_reduce
    bytes: float  # of the whole tensor
    count: float = 1
    backward: bool = False
    hidden: bool = False  # beside the products of the backward

    def seconds(self, group: Group, cluster: Cluster) -> float:
        rings = 2 if self.kind == "all_reduce" else 1
        return self.count * rings * ring_s(self.bytes, group, cluster)


def ring_s(size: float, group: Group, cluster: Cluster) -> float:
    """One way round the ring: an all-gather to, or a reduce-scatter of, a tensor of so many bytes."""
    if group.size == 1:
        return 0.0
    link = group.link(cluster)
    return (group.size - 1) / group.size * size / link.bytes_per_s + link.latency_s


@dataclass(frozen=True)
class Block:
    """What one microbatch costs in a part of a stage, before tensor ranks divide it. Launches are not divided."""

    name: str
    gemm_forward: float = 0.0  # FLOP
    gemm_backward: float = 0.0
    attention_forward: float = 0.0  # FLOP of score and value products as they are executed
    attention_backward: float = 0.0
    traffic_forward: float = 0.0  # bytes of elementwise work
    traffic_backward: float = 0.0
    kernels_forward: float = 0.0  # launches
    kernels_backward: float = 0.0
    collectives: tuple[Collective, ...] = ()
    gemm_share: float = 1.0  # what its products reach of the device's gemm_efficiency


@dataclass(frozen=True)
class Seconds:
    """Of one microbatch on one stage."""

    forward: float = 0.0  # computing
    backward: float = 0.0
    tensor_forward: float = 0.0  # waiting for tensor ranks
    tensor_backward: float = 0.0

    @property
    def tensor(self) -> float:
        return self.tensor_forward + self.tensor_backward

    @property
    def compute(self) -> float:
        return self.forward + self.backward

    @property
    def total(self) -> float:
        return self.compute + self.tensor


def block_seconds(block: Block, tensor: Group, cluster: Cluster) -> Seconds:
    device = cluster.device
    gemm = tensor.size * device.peak_flops * device.gemm_efficiency * block.gemm_share
    attention = tensor.size * device.peak_flops * device.attention_efficiency
    memory = tensor.size * device.memory_bytes_per_s
    waits = {(backward, hidden): 0.0 for backward in (False, True) for hidden in (False, True)}
    for collective in block.collectives:
        waits[collective.backward, collective.hidden] += collective.seconds(tensor, cluster)
    return Seconds(
        block.gemm_forward / gemm
        + block.attention_forward / attention
        + block.traffic_forward / memory
        + block.kernels_forward * device.kernel_launch_s,
        block.gemm_backward / gemm
        + block.attention_backward / attention
        + block.traffic_backward / memory
        + block.kernels_backward * device.kernel_launch_s,
        waits[False, False] + waits[False, True],
        waits[True, False] + max(0.0, waits[True, True] - block.gemm_backward / gemm),
    )


def stage_seconds(blocks: Sequence[Block], tensor: Group, cluster: Cluster) -> Seconds:
    parts = [block_seconds(block, tensor, cluster) for block in blocks]
    return Seconds(
        sum(part.forward for part in parts),
        sum(part.backward for part in parts),
        sum(part.tensor_forward for part in parts),
        sum(part.tensor_backward for part in parts),
    )


@dataclass(frozen=True)
class DataParallel:
    """What data-parallel ranks exchange in a step, of the stage that has most of it."""

    group: Group
    gradient_bytes: float  # of one device's buffers
    parameter_bytes: float  # gathered after the update; 0: gradients are all-reduced instead
    gradient_overlap: float = DATA_OVERLAP
    parameter_overlap: float = DATA_OVERLAP

    def exposed_s(self, cluster: Cluster, forward: float, backward: float) -> float:
        """What a step waits for. Args: forward, backward: seconds of one microbatch to hide behind."""
        rings = 1 if self.parameter_bytes else 2
        gradients = rings * ring_s(self.gradient_bytes, self.group, cluster)
        parameters = ring_s(self.parameter_bytes, self.group, cluster) if self.parameter_bytes else 0.0
        hidden = min(self.gradient_overlap * gradients, backward) + min(self.parameter_overlap * parameters, forward)
        return gradients + parameters - hidden


@dataclass(frozen=True)
class Job:
    """A step as this model sees it."""

    stages: tuple[tuple[Block, ...], ...]  # all chunks of a stage together
    microbatches: int
    tensor: Group
    data: DataParallel
    optimizer_values: float  # that one device updates
    virtual: int = 1  # chunks of a stage
    exchange_bytes: float = 0.0  # of one device, one way, between two stages
    exchange_crosses_nodes: bool = True


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step; the first six add up to it. Compute and tensor are those of the slowest stage."""

    compute_s: float
    tensor_s: float  # waiting for tensor ranks
    bubble_s: float  # the slowest stage's idle time while the pipe fills and drains
    exchange_s: float  # waiting for neighbouring stages
    data_s: float  # waiting for data-parallel ranks
    optimizer_s: float
    stages: tuple[Seconds, ...]

    @property
    def step_s(self) -> float:
        return self.compute_s + self.tensor_s + self.bubble_s + self.exchange_s + self.data_s + self.optimizer_s

    @property
    def bubble_share(self) -> float:
        """Of forward and backward."""
        return self.bubble_s / (self.compute_s + self.tensor_s + self.bubble_s)

    @property
    def tensor_share(self) -> float:
        return self.tensor_s / self.step_s

    @property
    def imbalance(self) -> float:
        """By how much the slowest stage exceeds the mean: 0.1 is 10 %."""
        times = [stage.total for stage in self.stages]
        return max(times) * len(times) / sum(times) - 1


def predict(job: Job, cluster: Cluster) -> Prediction:
    stages = tuple(stage_seconds(blocks, job.tensor, cluster) for blocks in job.stages)
    slowest = max(stages, key=lambda stage: stage.total)
    others = sum(stage.total for stage in stages) - slowest.total
    forward, backward = slowest.forward + slowest.tensor_forward, slowest.backward + slowest.tensor_backward
    return Prediction(
        compute_s=job.microbatches * slowest.compute,
        tensor_s=job.microbatches * slowest.tensor,
        bubble_s=others / job.virtual,
        exchange_s=_exchanges_s(job, cluster, forward, backward),
        data_s=job.data.exposed_s(cluster, forward, backward),
        optimizer_s=job.optimizer_values * OPTIMIZER_BYTES / cluster.device.memory_bytes_per_s + OPTIMIZER_FIXED_S,
        stages=stages,
    )


def _exchanges_s(job: Job, cluster: Cluster, forward: float, backward: float) -> float:
    """Waiting for neighbouring stages. Both directions go at once, and all devices of a node at once."""
    stages, virtual = len(job.stages), job.virtual
    if stages == 1:
        return 0.0
    if job.exchange_crosses_nodes:
        link = cluster.network
        one = job.exchange_bytes * cluster.devices_per_node / link.bytes_per_s + link.latency_s
    else:
        one = job.exchange_bytes / cluster.node_link.bytes_per_s + cluster.node_link.latency_s
    if virtual == 1:
        return 2 * (job.microbatches + stages - 1) * one
    # forwards before a first stage's first backward, and as many backwards at its end, do not overlap
    edges = 2 * (stages - 1) + (virtual - 1) * stages
    beyond = max(0.0, one - forward / virtual) + max(0.0, one - backward / virtual)
    return 2 * min(edges, job.microbatches * virtual) * one + job.microbatches * virtual * beyond
