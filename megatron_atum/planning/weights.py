"""Which weights a rank holds, and the buffers in which megatron-core reduces their gradients. No model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_atum.checkpoint.rules import is_split
from megatron_atum.checkpoint.table import Weight, weight_table
from megatron_atum.config.schema import ModelConfig, OptimizerConfig
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.training.parameter_groups import trains


@dataclass(frozen=True)
class RankWeight:
    name: str
    values: int  # on one tensor rank
    trains: bool
    replicated: bool  # whole on every tensor rank
    summed: bool  # gradient added up over tensor ranks (parallel/gradients.py)


def chunk_weights(model: ModelConfig, layout: ParallelLayout) -> list[list[RankWeight]]:
    """Weights of each chunk on any one tensor rank, in the order of the module's parameters."""
    chunk_of_unit = [index for index, units in enumerate(layout.units_per_chunk) for _ in range(units)]
    owners: dict[str, int] = {}
    found: list[list[tuple[int, int, RankWeight]]] = [[] for _ in layout.units_per_chunk]
    for row in weight_table(model):
        owner = owners.setdefault(_owner(row.name), len(owners))
        chunk = _chunk_of(row.name, model, chunk_of_unit)
        found[chunk].append((owner, _place(row.name), _rank_weight(row, model, layout)))
    return [[weight for _, _, weight in sorted(rows, key=lambda row: row[:2])] for rows in found]


def _rank_weight(row: Weight, model: ModelConfig, layout: ParallelLayout) -> RankWeight:
    values = math.prod(row.rule.geometry(row.shapes[0], 0, layout.tensor).dims)
    replicated = not is_split(row.rule)
    return RankWeight(
        row.name, values, trains(row, model.freeze), replicated, replicated and _is_summed(row.name, layout)
    )


def _chunk_of(name: str, model: ModelConfig, chunk_of_unit: Sequence[int]) -> int:
    part, *rest = name.split(".")
    if part in ("embedding", "vision", "perceiver"):
        return 0
    if part in ("final_norm", "head"):
        return chunk_of_unit[-1]
    return chunk_of_unit[int(rest[0]) // (model.cross_layer_interval if part == "decoder_layers" else 1)]


def _is_summed(name: str, layout: ParallelLayout) -> bool:
    if name.startswith(("vision.", "head.added.")) or ".query_norm." in name or ".key_norm." in name:
        return True
    return layout.sequence and not name.startswith("perceiver.")


# A module's own parameters come first, then those of its parts as they are made. The table has another order.
_ORDER = (
    *("class_embedding", "position_embedding", "patch_embedding", "pre_layernorm"),
    *("alpha_attention", "alpha_mlp"),
    *("input_norm", "input_layernorm", "context_norm", "latents_norm"),
    *("linear_proj", "linear_qkv", "query", "key_value", "output", "query_norm", "key_norm"),
    *("post_attention_norm", "pre_mlp_layernorm", "norm", "linear_fc1", "linear_fc2", "fc", "proj"),
)


def _owner(name: str) -> str:
    """The layer, or the part, that a weight belongs to."""
    parts = name.split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    if numbered:
        return ".".join(parts[: numbered[0] + 1])
    return ".".join(parts[:2]) if name.endswith("norm.weight") or name.endswith("norm.bias") else parts[0]


def _place(name: str) -> int:
    for part in reversed(name.split(".")):
        if part in _ORDER:
            return _ORDER.index(part)
    return len(_ORDER)


def trainable_values(weights: Sequence[RankWeight]) -> int:
    return sum(weight.values for weight in weights if weight.trains)


def buffer_values(weights: Sequence[RankWeight], optimizer: OptimizerConfig, data: int, *, bucketed: bool) -> int:
    """Values of the gradient buffer of a chunk, padding included.

    megatron-core 0.16.1, distributed/param_and_grad_buffer.py and distributed_data_parallel.py: parameters in reverse
    order; with the distributed optimizer each starts at a multiple of 64, and each bucket ends at a multiple of 128 and
    of the data-parallel ranks.

    Args:
        bucketed: only the first chunk of the first stage is.
    """
    sizes = [weight.values for weight in reversed(weights) if weight.trains]
    if not optimizer.distributed:
        return sum(sizes)
    bucket = math.inf
    if bucketed and optimizer.overlap_grad_reduce:
        bucket = optimizer.bucket_size or max(40_000_000, 1_000_000 * data)
    start = end = 0  # of the bucket; of the last parameter
    for size in sizes:
        end = _padded(end, 64) + size
        if end - start >= bucket:
            start = end = _padded(end, math.lcm(data, 128))
    return _padded(end, math.lcm(data, 128))


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def stage_buffers(
    weights: Sequence[Sequence[RankWeight]], layout: ParallelLayout, optimizer: OptimizerConfig
) -> list[int]:
    """Values of all gradient buffers of one device, by pipeline stage. Args: weights: of each chunk."""
    values = [0] * layout.pipeline
    for index, of_chunk in enumerate(weights):
        size = buffer_values(of_chunk, optimizer, layout.data, bucketed=index == 0)
        values[layout.chunk(index).pipeline_rank] += size
    return values
