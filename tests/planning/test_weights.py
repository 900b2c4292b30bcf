"""Weights of a rank against the modules that megatron-core and we build."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_atum.config.loader import preset
from megatron_atum.config.schema import FreezeConfig, ModelConfig, OptimizerConfig
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.weights import RankWeight, buffer_values, chunk_weights, stage_buffers, trainable_values
from tests.distributed import run_distributed
from tests.layouts import Degrees, groups_of

ALL = FreezeConfig(text=False, vision=False, lm_head=False)
SOME = FreezeConfig(text_exceptions=["Linear"], vision_exceptions=["LayerNorm", "Linear", "Embedding"])
MODELS = {
    "frozen": replace(preset("tiny"), freeze=FreezeConfig()),
    "all": replace(preset("tiny"), freeze=ALL, cross_layer_interval=2),
    "some": replace(preset("tiny"), freeze=SOME, vocab_size=511, additional_vocab_size=3),
}


def parameters(rank: int, world_size: int, models: list[ModelConfig], degrees: Degrees) -> list[list[list[tuple]]]:
    """(name, values, trains, how its gradient is combined) of each chunk of this rank, for each model."""
    from megatron_atum.model.stage import build_stages

    found = []
    for model in models:
        stages = build_stages(model, groups_of(model, degrees), torch.float32)
        found.append(
            [
                [
                    (name, p.numel(), p.requires_grad, getattr(p, "sum_gradient_over_tensor_ranks", None))
                    for name, p in stage.named_parameters()
                ]
                for stage in stages
            ]
        )
    return found


def as_tuple(weight: RankWeight) -> tuple[str, int, bool, bool | None]:
    return weight.name, weight.values, weight.trains, weight.summed if weight.replicated else None


@pytest.mark.parametrize("sequence", [False, True])
def test_the_same_as_the_modules_in_the_same_order(sequence: bool) -> None:
    degrees = Degrees(tensor=2, sequence=sequence)
    for found in run_distributed(parameters, 2, list(MODELS.values()), degrees):
        for model, chunks in zip(MODELS.values(), found, strict=True):
            ours = [[as_tuple(weight) for weight in weights] for weights in chunk_weights(model, degrees.layout(model))]
            assert [sorted(chunk) for chunk in ours] == [sorted(chunk) for chunk in chunks]
            # the order decides where buckets end, so it counts for what trains
            for mine, real in zip(ours, chunks, strict=True):
                assert [row for row in mine if row[2]] == [row for row in real if row[2]]


def test_chunks_share_out_the_whole_model() -> None:
    model = preset("atum-80b")
    whole = ParallelLayout(1, units_per_chunk=(20,))
    cut = ParallelLayout(32, tensor=8, pipeline=4, virtual_pipeline=2, units_per_chunk=(2, 3, 3, 2, 2, 3, 3, 2))
    (weights,) = chunk_weights(model, whole)
    assert sum(weight.values for weight in weights) == 79_967_843_624
    assert trainable_values(weights) == 14_051_416_872
    names = [weight.name for chunk in chunk_weights(model, cut) for weight in chunk]
    assert sorted(names) == sorted(weight.name for weight in weights)
    split = sum(w.values for chunk in chunk_weights(model, cut) for w in chunk if not w.replicated)
    assert split * 8 == sum(weight.values for weight in weights if not weight.replicated)  # 32,000 rows divide by 8


def weights(*sizes: int) -> list[RankWeight]:
    return [RankWeight("w", size, True, False, False) for size in sizes]


def test_buffers_by_hand() -> None:
    plain = OptimizerConfig(distributed=False)
    sharded = OptimizerConfig(bucket_size=100)
    assert buffer_values(weights(3, 70, 1), plain, 4, bucketed=True) == 74
    # reversed: 1 at 0, 70 at 64 to 134, 3 at 192 to 195; padded to 256
    assert buffer_values(weights(3, 70, 1), sharded, 4, bucketed=False) == 256
    # the bucket is full at 134 and ends at 256; 3 behind it
    assert buffer_values(weights(3, 70, 1), sharded, 4, bucketed=True) == 256 + 128
    assert buffer_values(weights(3, 70, 1), replace(sharded, overlap_grad_reduce=False), 4, bucketed=True) == 256
    assert buffer_values(weights(3), sharded, 3, bucketed=False) == math.lcm(3, 128)
    frozen = [replace(weight, trains=False) for weight in weights(3, 70, 1)]
    assert buffer_values(frozen, sharded, 4, bucketed=True) == 0


def test_a_stage_of_the_80b_model() -> None:
    """Cross-attention of five units: 2 H H + 2 H V + 3 H F over eight ranks, 8192 x 2 norms, 128 x 2 and two gates."""
    model = preset("atum-80b")
    layout = ParallelLayout(512, tensor=8, pipeline=4, sequence=True, units_per_chunk=(5, 5, 5, 5))
    H, F, V = 8192, 22016, 1280
    unit = (2 * H * H + 2 * H * V + 3 * H * F) // 8 + 2 * H + 2 * 128 + 2
    buffers = stage_buffers(chunk_weights(model, layout), layout, OptimizerConfig())
    assert buffers[1] == buffers[2]
    # padding: 64 for each of ten gates, then up to 2048
    assert 5 * unit <= buffers[1] <= 5 * unit + 10 * 64 + 16 * 128
    assert buffers[0] > buffers[1]  # the perceiver
