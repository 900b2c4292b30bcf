"""A dry run says what a real run does: the same messages to the byte, the same products to the unit."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_atum.batch import image_slice
from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config, KernelsConfig
from megatron_atum.flops import Work, products
from megatron_atum.model.cross_attention import GatedCrossAttentionLayer
from megatron_atum.model.vocabulary import padded_vocabulary
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.cluster import load_cluster
from megatron_atum.planning.dry_run import DryRun, as_on_accelerator
from megatron_atum.planning.recorder import GRAIN
from megatron_atum.planning.traffic import Microbatch, traffic_of
from megatron_atum.planning.weights import chunk_weights
from tests.distributed import run_distributed
from tests.planning.cases import FROZEN, IMAGES, LAYOUTS, PLAYED, RealRun, by_kind, config_of, laptop, play

FP8 = "kernels.frozen_gemm=fp8"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_a_real_run(name: str, played: dict[str, list[DryRun]], real: list[dict[str, RealRun]]) -> None:
    for run, rank in zip(played[name], PLAYED, strict=True):
        expected = real[rank][name]
        assert by_kind(run, "payload") == expected.payload, f"rank {rank}"
        assert by_kind(run, "calls") == expected.calls, f"rank {rank}"
        assert run.flops == expected.flops, f"rank {rank}"
        assert run.microbatches_run < run.microbatches
        assert run.unreached == []


# Closed forms --------------------------------------------------------------------------------------------------------


def expected_flops(config: Config, layout: ParallelLayout, run: DryRun) -> dict[str, int]:
    """Of all microbatches, from the rules of flops.py: what this rank's share of each product costs."""
    model, rows, S = config.model, len(IMAGES), config.data.sequence_length
    mine = image_slice(run.images, run.tensor_rank, layout.tensor)
    layers = {
        layer
        for chunk in layout.chunks_of(run.pipeline_rank)
        for unit in chunk.units
        for layer in range(unit * model.cross_layer_interval, (unit + 1) * model.cross_layer_interval)
    }
    found: Counter[str] = Counter()
    for product in products(model, Work(rows, S, run.images)):
        if product.part in ("cross_attention", "decoder") and product.layer in layers:
            causal = 2 if product.part == "decoder" and product.is_attention else 1  # kernels are counted in full
            found["attention" if product.is_attention else "gemm"] += product.model * causal // layout.tensor
        if product.part == "perceiver" and run.pipeline_rank == 0:
            found["attention" if product.is_attention else "gemm"] += product.model // layout.tensor
    if run.pipeline_rank == 0:
        for product in products(model, Work(rows, S, mine.stop - mine.start)):
            if product.part == "vision":
                kind = "attention" if product.is_attention else "convolution" if product.layer is None else "gemm"
                found[kind] += product.model
    if run.pipeline_rank == layout.pipeline - 1:
        padded = padded_vocabulary(model.vocab_size, layout.tensor) // layout.tensor
        for columns, gradients in ((padded, 1 if model.freeze.lm_head else 2), (model.additional_vocab_size, 2)):
            found["gemm"] += 2 * rows * S * model.hidden_size * columns * (1 + gradients)
    return {kind: run.microbatches * count for kind, count in found.items() if count}


@pytest.mark.parametrize("name", ["tensor and pipeline, frozen", "all train, nothing overlapped", "interleaved"])
def test_products_equal_closed_forms(name: str, played: dict[str, list[DryRun]]) -> None:
    config = config_of(name)
    layout = ParallelLayout.from_config(config, 4)
    weights = chunk_weights(config.model, layout)
    for run in played[name]:
        assert run.flops == expected_flops(config, layout, run), f"rank {run.rank}"
        held = [weight for chunk in layout.chunks_of(run.pipeline_rank) for weight in weights[chunk.index]]
        assert run.parameters == sum(weight.values for weight in held)
        assert run.trainable == sum(weight.values for weight in held if weight.trains)


@pytest.mark.parametrize(
    "changes", [[], *([FP8, f"training.recompute={kind}"] for kind in ("none", "selective", "full"))]
)
def test_messages_equal_closed_forms(changes: list[str]) -> None:
    """With all kinds of ranks at once: tensor, pipeline and data."""
    config, cluster = config_of("interleaved", FROZEN, "training.global_batch_size=16", *changes), laptop(2, 4)
    closed = traffic_of(Microbatch(config, ParallelLayout.from_config(config, 8), sum(IMAGES)), cluster)
    (runs,) = run_distributed(play, 1, config, cluster, [0, 7])
    for run in runs:
        stage, payload = closed.stages[run.pipeline_rank], by_kind(run, "payload")
        tensor = {operation: size for (group, operation), size in payload.items() if group == "tensor"}
        assert tensor == {kind: size for kind, size in stage.tensor.items() if size}
        assert payload["data", "reduce_scatter"] == stage.gradients
        assert payload["data", "all_gather"] == stage.parameters
        assert payload["pipeline", "send"] == stage.exchanges


@pytest.mark.parametrize("name", ["tensor and pipeline, frozen", "interleaved"])
def test_few_microbatches_stand_for_all(name: str, played: dict[str, list[DryRun]]) -> None:
    few = played[name]
    (every,) = run_distributed(play, 1, config_of(name), laptop(2, 2), list(PLAYED), IMAGES, few[0].microbatches)
    for short, whole in zip(few, every, strict=True):
        assert short.microbatches_run < whole.microbatches_run == whole.microbatches
        assert (short.messages, short.flops) == (whole.messages, whole.flops)
        # a loss stays of each microbatch, which takes the least that the allocator gives
        missing = GRAIN * (whole.microbatches_run - short.microbatches_run)
        assert whole.memory.total - missing <= short.memory.total <= whole.memory.total


def test_frozen_matrices_in_8_bits_take_half_the_memory() -> None:
    plain, fp8 = (
        run_distributed(play, 1, config_of("tensor and pipeline, frozen", *changes), laptop(2, 2), [0])[0][0]
        for changes in ([], [FP8])
    )
    assert (fp8.parameters, fp8.trainable, fp8.flops) == (plain.parameters, plain.trainable, plain.flops)
    H, F, V, W = 128, 320, 64, 128  # of model.preset=tiny; two tensor ranks, two layers in a stage
    text, vision = 2 * (4 * H * H + 3 * H * F) // 2, 2 * (4 * V * V + 2 * V * W)
    scales = 4 * (2 * ((3 * H + 2 * F) // 2 + 2 * H) + 2 * (5 * V + W))
    scales += 4 * (2 * ((H + F) // 2 + 2 * H) + 2 * (3 * V + W))  # ones, of inputs
    saved = plain.memory.parameters - fp8.memory.parameters
    assert saved == pytest.approx(3 * (text + vision) - scales, abs=48 * GRAIN), "fp32 here: 3 of 4 bytes"
    assert (plain.memory.host, fp8.memory.host) == (0, 4 * (text + vision))
    assert (fp8.memory.gradients, fp8.memory.optimizer) == (plain.memory.gradients, plain.memory.optimizer)


def test_links_follow_the_nodes(played: dict[str, list[DryRun]]) -> None:
    name = "tensor and pipeline, frozen"
    (together,) = run_distributed(play, 1, config_of(name), laptop(1, 4), [0])
    (torn,) = run_distributed(play, 1, config_of(name), laptop(4, 1), [0])
    links = [{(m.group, m.link) for m in runs[0].messages} for runs in (played[name], together, torn)]
    assert links[0] == {("tensor", "node"), ("pipeline", "network")}
    assert links[1] == {("tensor", "node"), ("pipeline", "node")}
    assert links[2] == {("tensor", "network"), ("pipeline", "network")}


# What it is for ------------------------------------------------------------------------------------------------------


def disconnected(rank: int, world_size: int) -> list[str]:
    """Of a model whose cross-attention forgets its MLP."""

    def forward(layer: Any, hidden: Any, latents: Any, plan: Any) -> Any:
        return hidden + torch.tanh(layer.alpha_attention) * layer.attention(layer.input_norm(hidden), latents, plan)

    GatedCrossAttentionLayer.forward = forward  # type: ignore[method-assign]
    (run,) = play(rank, world_size, config_of("tensor and pipeline, frozen"), laptop(2, 2), [2])
    return run.unreached


def test_names_what_backward_does_not_reach() -> None:
    (unreached,) = run_distributed(disconnected, 1)
    assert len(unreached) == 2 * 4  # two layers: gate, norm and both projections of the MLP
    assert "cross_attention_layers.2.alpha_mlp" in unreached


def timed_play(*arguments: Any) -> tuple[list[DryRun], float]:
    """With the seconds of a processor, which others on the machine do not change."""
    began = time.process_time()
    return play(*arguments), time.process_time() - began


def test_a_rank_of_512_fits_into_a_small_machine() -> None:
    """The 80B recipe: stage 1 by hand, and what it took."""
    config = load_config(EXAMPLES / "atum-80b" / "pretrain.yaml", ["parallel.tensor=8", "training.micro_batch_size=4"])
    (((run,), seconds),) = run_distributed(timed_play, 1, config, load_cluster("p4de-64"), [128 + 37], [11] * 4)
    assert (run.pipeline_rank, run.data_rank, run.tensor_rank) == (1, 4, 5)
    assert (run.microbatches, run.microbatches_run) == (56, 4)
    H, F, V = 8192, 22016, 1280
    decoder, cross = (
        (4 * H * H + 3 * H * F) // 8 + 2 * H,
        (2 * H * H + 2 * H * V + 3 * H * F) // 8 + 2 * H + 2 * 128 + 2,
    )
    assert (run.parameters, run.trainable) == (20 * decoder + 5 * cross, 5 * cross)
    assert seconds < 60 and run.process_gib < 2
    assert 14 < run.memory.total / 2**30 < 20


def test_kernels_that_need_a_device_are_played_by_torch_s() -> None:
    """And te's 8 bits as bf16: torch's are another thing."""
    for backend, played in (("te", "bf16"), ("torch", "fp8")):
        config = Config(kernels=KernelsConfig(backend=backend, frozen_gemm="fp8", adam="apex"))
        assert as_on_accelerator(config).kernels == KernelsConfig(frozen_gemm=played)
