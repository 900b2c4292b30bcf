"""What the ranks of a layout send each other in a step, in closed form, to the byte.

Derived from our model and megatron-core 0.16.1 (tensor_parallel/layers.py and mappings.py, schedules.py,
param_and_grad_buffer.py). A payload is the whole tensor of a collective: what an all-gather gives, what a
reduce-scatter takes. Groups of one rank move nothing and count nothing. Left out are some hundred bytes of a step:
counts, losses and the norm of the gradients.

Under sequence parallelism each column-parallel layer gathers its input and each row-parallel one scatters its output;
backward does the opposite. A column-parallel layer that trains gathers its input again for the gradient of its weight,
a frozen one does not, and with kernels.frozen_gemm=fp8 it gathers 8 bits of each value. Without sequence parallelism
row-parallel layers all-reduce their output and column-parallel ones, in backward, the gradient of their input.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_atum.batch import images_per_tensor_rank
from megatron_atum.config.schema import Config, ModelConfig
from megatron_atum.model.stage_tensor import latent_rows
from megatron_atum.parallel.layout import Chunk, ParallelLayout
from megatron_atum.planning.cluster import Cluster
from megatron_atum.planning.cost import Collective
from megatron_atum.planning.weights import RankWeight, chunk_weights, stage_buffers

GRADIENT_BYTES = 4  # reduced in fp32


@dataclass(frozen=True)
class Microbatch:
    """One microbatch on a layout. A mean number of images need not be whole; a run's own is."""

    config: Config
    layout: ParallelLayout
    images: float

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def rows(self) -> int:
        return self.config.training.micro_batch_size

    @cached_property
    def weights(self) -> list[list[RankWeight]]:
        """Of each chunk."""
        return chunk_weights(self.model, self.layout)

    @cached_property
    def buffers(self) -> list[int]:
        """Values of the gradient buffers of a device of each stage."""
        return stage_buffers(self.weights, self.layout, self.config.optimizer)

    @property
    def number(self) -> int:
        """Microbatches of one data-parallel rank in a step."""
        return self.config.training.global_batch_size // (self.rows * self.layout.data)

    @property
    def tokens(self) -> int:
        return self.rows * self.config.data.sequence_length

    @property
    def whole_images(self) -> int:
        return math.ceil(self.images)

    @property
    def images_of_rank(self) -> int:
        """That the busiest tensor rank encodes; all pad to it."""
        return images_per_tensor_rank(self.whole_images, self.layout.tensor)

    @property
    def item(self) -> int:
        """Bytes of a weight or activation. training.precision=auto counts as bf16, as with an accelerator."""
        return 4 if self.config.training.precision == "fp32" else 2

    @property
    def text_bytes(self) -> int:
        """[S,b,H]"""
        return self.tokens * self.model.hidden_size * self.item

    @property
    def latent_rows(self) -> int:
        return latent_rows(self.whole_images, self.rows, self.model, self.layout)

    @property
    def latent_bytes(self) -> int:
        """The rows of all ranks that carry a share of the latents."""
        return self.layout.sequence_shards * self.latent_rows * self.rows * self.model.hidden_size * self.item

    @property
    def exchange_bytes(self) -> int:
        """[s+r,b,H], what one device sends to the next stage."""
        positions = self.config.data.sequence_length // self.layout.sequence_shards + self.latent_rows
        return positions * self.rows * self.model.hidden_size * self.item


def chunk_collectives(micro: Microbatch, chunk: Chunk) -> dict[str, tuple[Collective, ...]]:
    """Of the tensor group for one microbatch, by part of the chunk."""
    if micro.layout.tensor == 1:
        return {}
    parts: dict[str, list[Collective]] = {}
    if chunk.is_first:
        parts["vision"] = [Collective("all_gather", _feature_bytes(micro))]
        parts["perceiver"] = list(_perceiver(micro))
        parts["embedding"] = list(_embedding(micro))
    parts["latents"] = list(_latents(micro, carries=chunk.is_first))
    units = chunk.num_units
    frozen = micro.model.freeze.text and "Linear" not in micro.model.freeze.text_exceptions
    layers = units * micro.model.cross_layer_interval
    parts["cross_attention"] = list(_layers(micro, units, trains=True))
    parts["decoder"] = list(_layers(micro, layers, trains=not frozen))
    for name, again in _recomputed(micro, layers, frozen=frozen).items():
        parts[name] += again
    if chunk.is_last:
        parts["head"] = list(_head(micro))
    return {name: tuple(collectives) for name, collectives in parts.items()}


def _layers(micro: Microbatch, number: int, *, trains: bool) -> Iterator[Collective]:
    """Attention and MLP: two column-parallel and two row-parallel layers."""
    size, each = micro.text_bytes, 2 * number
    if not micro.layout.sequence:
        yield Collective("all_reduce", size, each)
        # beside the gradient of the weight, where it trains
        yield Collective("all_reduce", size, each, backward=True, hidden=trains)
        return
    yield from _gathers(micro, each, trains=trains)
    yield Collective("reduce_scatter", size, each)
    yield Collective("all_gather", size, each, backward=True)
    yield Collective("reduce_scatter", size, each, backward=True, hidden=trains)
    if trains:
        yield Collective("all_gather", size, each, backward=True, hidden=True)


def _gathers(micro: Microbatch, number: int, *, trains: bool, backward: bool = False) -> Iterator[Collective]:
    """The inputs of so many column-parallel layers; of frozen ones, with fp8, their values and a scale per token."""
    kernels = micro.config.kernels
    if trains or (kernels.backend, kernels.frozen_gemm) != ("torch", "fp8"):
        yield Collective("all_gather", micro.text_bytes, number, backward=backward)
        return
    yield Collective("all_gather", micro.text_bytes // micro.item, number, backward=backward)
    yield Collective("all_gather", 4 * micro.tokens, number, backward=backward)


def recomputed_layers(config: Config, layers: int) -> tuple[int, int]:
    """Decoder layers of a chunk that full recomputation repeats, and in how many pieces (model/recompute.py)."""
    training = config.training
    if training.recompute != "full":
        return 0, 0
    if training.recompute_method == "block":
        number = min(training.recompute_layers, layers)
        return number, number
    return layers, -(-layers // training.recompute_layers)


def _recomputed(micro: Microbatch, layers: int, *, frozen: bool) -> dict[str, list[Collective]]:
    """What backward repeats, by part. torch stops where nothing more is needed: before a piece's last reduction."""
    size, interval = micro.text_bytes, micro.model.cross_layer_interval
    if micro.config.training.recompute == "selective":
        if not micro.layout.sequence:
            return {}
        again = {"cross_attention": (layers // interval, True), "decoder": (layers, not frozen)}
        return {
            name: list(_gathers(micro, count, trains=trains, backward=True)) for name, (count, trains) in again.items()
        }
    number, pieces = recomputed_layers(micro.config, layers)
    found = {}
    parts = (("cross_attention", -(-number // interval), 0, True), ("decoder", number, pieces, not frozen))
    for name, count, saved, trains in parts:
        reduction = "reduce_scatter" if micro.layout.sequence else "all_reduce"
        found[name] = [Collective(reduction, size, 2 * count - saved, backward=True)] if count else []
        if micro.layout.sequence and count:
            found[name] += _gathers(micro, 2 * count, trains=trains, backward=True)
    return found


def _feature_bytes(micro: Microbatch) -> int:
    """Vision states of all tensor ranks, each padded to the share of the busiest."""
    vision = micro.model.vision
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    return micro.layout.tensor * micro.images_of_rank * positions * vision.embed_dim * micro.item


def _perceiver(micro: Microbatch) -> Iterator[Collective]:
    """No sequence parallelism: outputs are all-reduced, and in backward the gradients of both inputs."""
    perceiver, vision = micro.model.perceiver, micro.model.vision
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    one = micro.images * vision.embed_dim * micro.item
    latents, context = one * perceiver.num_latents, one * (positions + perceiver.num_latents)
    full = micro.config.training.recompute == "full"
    yield Collective("all_reduce", latents, 2 * perceiver.depth)
    yield Collective("all_reduce", context, perceiver.depth, backward=True)
    yield Collective("all_reduce", latents, perceiver.depth * (2 if full else 1), backward=True)


def _embedding(micro: Microbatch) -> Iterator[Collective]:
    if not micro.layout.sequence:
        yield Collective("all_reduce", micro.text_bytes)
        return
    yield Collective("reduce_scatter", micro.text_bytes)
    if not micro.model.freeze.text:
        yield Collective("all_gather", micro.text_bytes, backward=True)


def _latents(micro: Microbatch, *, carries: bool) -> Iterator[Collective]:
    """Each chunk gathers them once; the first one has cut them up before, and gathers the gradients of that."""
    if not micro.layout.sequence:
        yield Collective("all_reduce", micro.latent_bytes, backward=True)
        return
    yield Collective("all_gather", micro.latent_bytes)
    yield Collective("reduce_scatter", micro.latent_bytes, backward=True)
    if carries:
        yield Collective("all_gather", micro.latent_bytes, backward=True)


def _head(micro: Microbatch) -> Iterator[Collective]:
    if micro.layout.sequence:
        yield Collective("all_gather", micro.text_bytes)
        yield Collective("reduce_scatter", micro.text_bytes, backward=True)
    else:
        yield Collective("all_reduce", micro.text_bytes, backward=True)
    # of each token the largest logit, then its sum of exponentials and its target's logit, all fp32
    yield Collective("all_reduce", 4 * micro.tokens)
    yield Collective("all_reduce", 8 * micro.tokens)


# A step ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageTraffic:
    """Of one device of a pipeline stage in a step; bytes are payload."""

    tensor: dict[str, float]  # all_gather | reduce_scatter | all_reduce -> bytes
    tensor_calls: dict[str, int]
    to_next: int  # activations, to the next stage (the last one to the first, between chunks)
    to_previous: int  # their gradients
    gradients: int  # reduce-scattered over data-parallel ranks; all-reduced without the distributed optimizer
    parameters: int  # gathered after the update

    @property
    def exchanges(self) -> int:
        return self.to_next + self.to_previous


@dataclass(frozen=True)
class Traffic:
    """Of a step. Rings leave each node that they touch once."""

    stages: tuple[StageTraffic, ...]
    network: dict[str, float]  # bytes out of the busiest node: tensor | stages | data
    node_link: float  # bytes out of the busiest device to others of its node
    tensor_leaves_node: bool

    @property
    def network_bytes(self) -> float:
        return sum(self.network.values())


def traffic_of(micro: Microbatch, cluster: Cluster) -> Traffic:
    """What a step of such microbatches sends.

    Bytes are exact for a whole number of images in each. Rows for latents and gathered features are those of the next
    whole number, as in a run whose largest microbatch has it.
    """
    layout = micro.layout
    stages = tuple(_stage(micro, pipeline_rank) for pipeline_rank in range(layout.pipeline))
    network: dict[int, Counter[str]] = {node: Counter() for node in range(cluster.nodes)}
    inside: Counter[int] = Counter()
    for kind, source, target, size in _sent(micro, stages):
        if cluster.crosses_nodes((source, target)):
            network[cluster.node_of(source)][kind] += size  # type: ignore[assignment]
        else:
            inside[source] += size  # type: ignore[assignment]
    busiest = max(network.values(), key=lambda node: sum(node.values()))
    groups = (_tensor_ranks(layout, p, d) for p in range(layout.pipeline) for d in range(layout.data))
    return Traffic(
        stages,
        {kind: float(busiest[kind]) for kind in ("tensor", "stages", "data")},
        float(max(inside.values(), default=0)),
        any(cluster.crosses_nodes(ranks) for ranks in groups),
    )


def _stage(micro: Microbatch, pipeline_rank: int) -> StageTraffic:
    layout, number = micro.layout, micro.number
    values = micro.buffers[pipeline_rank] if layout.data > 1 else 0
    payload: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    to_next = to_previous = summed = 0
    for chunk in layout.chunks_of(pipeline_rank):
        for collective in (c for part in chunk_collectives(micro, chunk).values() for c in part):
            payload[collective.kind] += number * collective.count * collective.bytes  # type: ignore[assignment]
            calls[collective.kind] += number * int(collective.count)
        to_next += 0 if chunk.is_last else number * micro.exchange_bytes
        to_previous += 0 if chunk.is_first else number * micro.exchange_bytes
        summed += sum(weight.values for weight in micro.weights[chunk.index] if weight.trains and weight.summed)
    if layout.tensor > 1 and summed:  # parallel/gradients.py, once a step
        payload["all_reduce"] += GRADIENT_BYTES * summed
        calls["all_reduce"] += 1
    parameters = micro.item * values if micro.config.optimizer.distributed else 0
    return StageTraffic(dict(payload), dict(calls), to_next, to_previous, GRADIENT_BYTES * values, parameters)


def _sent(micro: Microbatch, stages: Sequence[StageTraffic]) -> Iterator[tuple[str, int, int, float]]:
    """(kind, from rank, to rank, bytes on the wire) of everything in a step."""
    layout = micro.layout
    for p, stage in enumerate(stages):
        tensor = sum(size * (2 if kind == "all_reduce" else 1) for kind, size in stage.tensor.items())
        data = stage.gradients * (1 if stage.parameters else 2) + stage.parameters
        for d in range(layout.data):
            yield from _ring("tensor", _tensor_ranks(layout, p, d), tensor)
        for t in range(layout.tensor):
            ranks = [_rank(layout, p, d, t) for d in range(layout.data)]
            yield from _ring("data", ranks, data)
        for d in range(layout.data):
            for t in range(layout.tensor):
                source = _rank(layout, p, d, t)
                yield "stages", source, _rank(layout, (p + 1) % layout.pipeline, d, t), stage.to_next
                yield "stages", source, _rank(layout, (p - 1) % layout.pipeline, d, t), stage.to_previous


def _ring(kind: str, ranks: Sequence[int], size: float) -> Iterator[tuple[str, int, int, float]]:
    """A ring in which each rank sends to the next all but one n-th of a tensor."""
    number = len(ranks)
    for place, rank in enumerate(ranks):
        yield kind, rank, ranks[(place + 1) % number], size * (number - 1) / number


def _rank(layout: ParallelLayout, pipeline_rank: int, data_rank: int, tensor_rank: int) -> int:
    return (pipeline_rank * layout.data + data_rank) * layout.tensor + tensor_rank


def _tensor_ranks(layout: ParallelLayout, pipeline_rank: int, data_rank: int) -> list[int]:
    first = _rank(layout, pipeline_rank, data_rank, 0)
    return list(range(first, first + layout.tensor))
