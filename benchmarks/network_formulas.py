"""Bytes that leave a node in one training step, by scheme, in closed form. fp32; forward, backward and update.

Collectives run in rings over ranks in rank order, as gloo's do. With all ranks of a node next to each other a ring
leaves each node once, and every link of a ring over n ranks carries, of tensors with B bytes in all,

    all-gather, reduce-scatter   (n-1)/n B
    all-reduce                   2 (n-1)/n B

gloo, as torch uses it, does a reduce-scatter as an all-reduce and keeps a part of it. `Traffic.moved` has that,
`Traffic.ring` has the ring's optimum, which NCCL would reach. Left out: headers and acknowledgements (about 1 % of the
bytes on fake nodes), gloo's messages with which ranks agree on each exchange, what schemes exchange in numbers instead
of tensors (losses, gradient norms), and a gather by which FSDP2 fetches the last layer of the vision tower ahead of a
backward that it does not have.

    ZeRO-3, FSDP2   every weight is gathered before its use in forward and in backward, but once where nothing below
                    needs a gradient (the frozen vision tower); gradients of trainable weights are reduce-scattered.
    FSDP2 HSDP      the same inside each node; between nodes one all-reduce of the trainable weights' gradients.
    this project    each pipeline stage sends its stage tensor (model/stage_tensor.py) once per microbatch and gets its
                    gradient back; data-parallel ranks reduce-scatter gradients and gather updated weights, once a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_atum.checkpoint.table import Weight, weight_table
from megatron_atum.config.schema import ModelConfig
from megatron_atum.parallel.layout import ParallelLayout

VALUE = 4  # bytes of a number in fp32
Shape = tuple[int, ...]
Shard = Callable[[Shape, int], int]  # values of a tensor that each of so many ranks holds


@dataclass(frozen=True)
class Traffic:
    """Bytes out of one node in one step."""

    moved: float  # as gloo moves them
    ring: float  # with reduce-scatters at the optimum of a ring

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.moved + other.moved, self.ring + other.ring)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.moved * times, self.ring * times)


NOTHING = Traffic(0.0, 0.0)


def all_gather(ranks: int, size: float) -> Traffic:
    """On one link of the ring. size: bytes that every rank has in the end."""
    return Traffic(1.0, 1.0) * ((ranks - 1) / ranks * size)


def reduce_scatter(ranks: int, size: float) -> Traffic:
    """On one link of the ring. size: bytes that every rank begins with."""
    return Traffic(2.0, 1.0) * ((ranks - 1) / ranks * size)


def all_reduce(ranks: int, size: float) -> Traffic:
    """On one link of the ring. size: bytes that every rank has."""
    return Traffic(2.0, 2.0) * ((ranks - 1) / ranks * size)


# Sharded data parallelism ---------------------------------------------------------------------------------------------


def by_values(shape: Shape, ranks: int) -> int:
    """How DeepSpeed deals out a tensor: flattened, padded to a multiple of the ranks."""
    return -(-math.prod(shape) // ranks)


def by_rows(shape: Shape, ranks: int) -> int:
    """How FSDP2 does it: by the first dimension, padded to a multiple of the ranks."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])


def full_shard(model: ModelConfig, ranks: int, shard: Shard) -> Traffic:
    """Out of each node, whatever the number of its ranks."""
    total = NOTHING
    for row in weight_table(model):
        for shape in row.shapes:
            size = shard(shape, ranks) * ranks * VALUE
            total += all_gather(ranks, size) * _uses(row)
            if trains(row):
                total += reduce_scatter(ranks, size)
    return total


def hybrid_shard(model: ModelConfig, nodes: int, ranks_per_node: int) -> Traffic:
    """Each rank of a node reduces its shard of the gradients with its peers on the other nodes."""
    shards = sum(by_rows(shape, ranks_per_node) for row in weight_table(model) if trains(row) for shape in row.shapes)
    return all_reduce(nodes, shards * VALUE) * ranks_per_node


def trains(row: Weight) -> bool:
    """In the pretraining recipe."""
    return not row.backbone


def _uses(row: Weight) -> int:
    return 1 if row.name.startswith("vision.") else 2


# This project ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Microbatches:
    """What one data-parallel rank goes through in a step; all are alike."""

    number: int
    rows: int  # of each
    length: int  # tokens of a row
    images: int  # of each


def model_parallel(
    model: ModelConfig, layout: ParallelLayout, batches: Microbatches, ranks_per_node: int
) -> list[Traffic]:
    """Out of each node."""
    assert ranks_per_node % layout.tensor == 0, "tensor ranks of one group lie on two nodes"
    out = [NOTHING] * (layout.world_size // ranks_per_node)
    for sender, receiver, traffic in [*_between_stages(model, layout, batches), *_between_replicas(model, layout)]:
        if sender // ranks_per_node != receiver // ranks_per_node:
            out[sender // ranks_per_node] += traffic
    return out


def stage_tensor_bytes(model: ModelConfig, layout: ParallelLayout, batches: Microbatches) -> int:
    """Of one rank and microbatch: [S/T + r, b, H], where r rows of [b,H] hold this rank's part of all latents."""
    parts, width = layout.sequence_shards, batches.rows * model.hidden_size
    latents = batches.images * model.perceiver.num_latents * model.vision.embed_dim
    return (batches.length // parts + max(1, -(-latents // (parts * width)))) * width * VALUE


def _between_stages(
    model: ModelConfig, layout: ParallelLayout, batches: Microbatches
) -> Iterator[tuple[int, int, Traffic]]:
    """Sender, receiver, bytes: text states and latents forward, their gradients back."""
    assert layout.virtual_pipeline == 1
    size = float(batches.number * stage_tensor_bytes(model, layout, batches))
    step = layout.tensor * layout.data  # from a rank to its peer on the next stage
    for rank in range(layout.world_size - step):
        yield rank, rank + step, Traffic(size, size)
        yield rank + step, rank, Traffic(size, size)


def _between_replicas(model: ModelConfig, layout: ParallelLayout) -> Iterator[tuple[int, int, Traffic]]:
    """Sender, receiver, bytes: links of the data-parallel rings."""
    for rank in range(layout.world_size if layout.data > 1 else 0):
        stage, replica, tensor_rank = layout.coordinates(rank)
        neighbour = rank + ((replica + 1) % layout.data - replica) * layout.tensor
        size = buffer_values(model, layout, stage, tensor_rank) * VALUE
        yield rank, neighbour, reduce_scatter(layout.data, size) + all_gather(layout.data, size)


def buffer_values(model: ModelConfig, layout: ParallelLayout, stage: int, tensor_rank: int) -> int:
    """Length of the gradient buffer of a rank, one bucket: weights begin at multiples of 64, and the bucket ends at
    one of 128 and of the data-parallel ranks (megatron-core, param_and_grad_buffer.py, distributed optimizer)."""
    values = 0
    for row in weight_table(model):
        if trains(row) and _stage_of(row, layout) == stage:
            own = math.prod(row.rule.geometry(row.shapes[0], tensor_rank, layout.tensor).dims)
            values = -(-values // 64) * 64 + own
    unit = math.lcm(layout.data, 128)
    return -(-values // unit) * unit


def _stage_of(row: Weight, layout: ParallelLayout) -> int:
    """Of a trainable weight."""
    part, *rest = row.name.split(".")
    if part == "cross_attention_layers":
        return next(stage for stage in range(layout.pipeline) if int(rest[0]) in layout.chunk(stage).units)
    return layout.pipeline - 1 if part == "head" else 0
