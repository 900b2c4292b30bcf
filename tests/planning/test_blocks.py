"""What blocks compute, against the FLOP counter and hand counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_atum.config.loader import load_config
from megatron_atum.config.schema import Config
from megatron_atum.flops import Work, executed_flops, model_flops, products
from megatron_atum.parallel.layout import ParallelLayout
from megatron_atum.planning.blocks import LOGIT_FORWARD, counted, model_blocks
from megatron_atum.planning.cost import Block
from megatron_atum.planning.traffic import Microbatch
from tests.planning.cases import EIGHT

RECIPE = Path(__file__).parents[2] / "examples/atum-80b/pretrain.yaml"
LENGTH = 1024


def config_of(*overrides: str) -> Config:
    return load_config(RECIPE, [*EIGHT, "parallel.units_per_chunk=null", *overrides])


def blocks_of(config: Config, images: float, world_size: int = 512) -> tuple[tuple[Block, ...], ...]:
    return model_blocks(Microbatch(config, ParallelLayout.from_config(config, world_size), images))


def products_of(blocks: Iterable[Block]) -> float:
    return sum(block.gemm_forward + block.gemm_backward for block in blocks)


@pytest.mark.parametrize("layout", [(1, 1, 1), (1, 4, 1), (1, 4, 5)])
def test_products_are_those_of_the_flop_counter(layout: tuple[int, int, int]) -> None:
    """Vision is not split and the head has nothing to repeat at one tensor rank, so all of it adds up."""
    tensor, pipeline, virtual = layout
    config = config_of(
        f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={virtual}"
    )
    blocks = [block for stage in blocks_of(config, 44, world_size=64) for block in stage]
    every = products(config.model, Work(4, LENGTH, 44))
    assert products_of(blocks) == pytest.approx(sum(product.model for product in every if not product.is_attention))
    forward = sum(block.attention_forward for block in blocks)
    assert forward == pytest.approx(sum(product.forward for product in every if product.is_attention))


def test_recomputation_executes_what_the_flop_counter_says() -> None:
    work = Work(4, LENGTH, 44)
    for recompute in ("selective", "full"):
        config = config_of("parallel.tensor=1", "parallel.pipeline=4", f"training.recompute={recompute}")
        blocks = [block for stage in blocks_of(config, 44) for block in stage]
        plain = [block for stage in blocks_of(config_of("parallel.tensor=1"), 44) for block in stage]
        again = executed_flops(config.model, work, recompute).total - model_flops(config.model, work).total
        attention = sum(b.attention_backward - p.attention_backward for b, p in zip(blocks, plain, strict=True))
        assert products_of(blocks) - products_of(plain) + attention == pytest.approx(again)


def test_half_a_stage_is_recomputed() -> None:
    some = ("training.recompute=full", "training.recompute_method=block", "training.recompute_layers=10")
    (name,) = {block.name for block in blocks_of(config_of(*some), 44)[1]} & {"decoder"}
    found = [
        next(block for block in blocks_of(config_of(*overrides), 44)[1] if block.name == name)
        for overrides in ((), some, some[:1])
    ]
    none, half, full = (block.gemm_backward for block in found)
    assert half == pytest.approx((none + full) / 2)  # ten of twenty layers


def test_a_stage_holds_what_its_chunks_hold() -> None:
    names = [[block.name for block in stage] for stage in blocks_of(config_of(), 44)]
    assert names[0] == ["vision", "perceiver", "embedding", "latents", "cross_attention", "decoder"]
    assert names[1] == names[2] == ["latents", "cross_attention", "decoder"]
    assert names[3] == ["latents", "cross_attention", "decoder", "head"]
    interleaved = blocks_of(config_of("parallel.virtual_pipeline=5"), 44)
    assert [block.name for block in interleaved[1]] == names[1] * 5


def test_the_busiest_tensor_rank_paces_the_vision_tower() -> None:
    """44 images over eight ranks: six of them each, as 48 would be. One image costs the same as eight."""

    def vision(images: float) -> float:
        return blocks_of(config_of(), images)[0][0].gemm_forward

    assert vision(44) == pytest.approx(vision(48)) == pytest.approx(48 * vision(8) / 8)
    assert vision(1) == pytest.approx(vision(8))
    assert vision(44) < vision(49)
    assert vision(0) == 0
    assert blocks_of(config_of(), 44)[0][0].traffic_backward == 0  # frozen


def test_every_tensor_rank_computes_the_added_rows() -> None:
    head = blocks_of(config_of(), 44)[3][-1]
    plain = blocks_of(config_of("parallel.tensor=1"), 44)[3][-1]
    added = 2 * 4096 * 8192 * 2
    assert plain.gemm_forward == 2 * 4096 * 8192 * 32_002
    assert head.gemm_forward - plain.gemm_forward == pytest.approx(7 * added)
    assert head.gemm_backward - plain.gemm_backward == pytest.approx(2 * 7 * added)
    assert head.traffic_forward - plain.traffic_forward == LOGIT_FORWARD * 4096 * 7 * 2


def test_elementwise_work_is_shared_under_sequence_parallelism_only() -> None:
    shared, whole = (
        blocks_of(config_of(f"parallel.sequence={on}"), 44)[1][2].traffic_forward for on in ("true", "false")
    )
    # 10 H of 16 H + 3 F are whole on each of eight ranks
    assert shared == 20 * 4096 * (16 * 8192 + 3 * 22016) * 2
    assert whole - shared == pytest.approx(7 * 20 * 4096 * 10 * 8192 * 2)


def test_elementwise_work_of_the_other_parts() -> None:
    """Hand counts in bf16: four rows of 1024 tokens, 44 images of 257 positions in eight shares of 6."""
    first, last = blocks_of(config_of(), 44)[0], blocks_of(config_of(), 44)[3]
    found = {block.name: block for block in (*first, last[-1])}
    assert found["vision"].traffic_forward == 48 * 32 * 257 * (22 * 1280 + 2 * 5120) * 2
    assert found["perceiver"].traffic_forward == 8 * 44 * 6 * (4 * (257 + 64) + 8 * 64) * 1280 * 2
    of_tokens, of_latents = 4096 * (23 * 8192 + 3 * 22016), 44 * 2 * 64 * 8192
    assert found["cross_attention"].traffic_forward == 5 * (of_tokens + of_latents) * 2
    logits, stream = 4096 * (32_000 + 8 * 2), 4096 * 6 * 8192 * 2
    assert found["head"].traffic_forward == 36 * logits + stream
    trained = 8 * 10 * 2 * 8192  # the added rows, on every rank
    assert found["head"].traffic_backward == 44 * logits + 2 * stream + trained


def test_products_of_images_are_slower() -> None:
    shares = {block.name: block.gemm_share for stage in blocks_of(config_of(), 44) for block in stage}
    assert {name: share for name, share in shares.items() if share != 1.0} == {"vision": 0.625, "perceiver": 0.625}


def test_backward_of_attention_makes_five_products_for_two() -> None:
    decoder = blocks_of(config_of(), 44)[1][2]
    # two causal products of a layer: 4 rows x 1024 x 1024 / 2 pairs x 8192, a multiplication and an addition each
    assert decoder.attention_forward == 20 * 2 * 2 * 4 * 1024 * 1024 / 2 * 8192
    assert decoder.attention_backward == 2.5 * decoder.attention_forward


def test_gradients_of_what_trains_are_added_up() -> None:
    plain = blocks_of(config_of(), 44)[1][2]
    assert plain.traffic_backward == 2 * plain.traffic_forward
    trained = blocks_of(config_of("model.freeze.text=false"), 44)[1][2]
    # ten bytes for each of 20 layers x (4 H H + 3 H F) and, on every rank, of their norms
    matrices, norms = 20 * (4 * 8192**2 + 3 * 8192 * 22016), 20 * 2 * 8192
    assert trained.traffic_backward - plain.traffic_backward == pytest.approx(10 * (matrices + 8 * norms))


def test_a_mean_number_of_images_lies_between() -> None:
    model = config_of().model
    low, middle, high = (counted(model, 4, LENGTH, images) for images in (43, 43.25, 44))
    for key, products_ in middle.items():
        expected = low[key].forward + 0.25 * (high[key].forward - low[key].forward)
        assert products_.forward == pytest.approx(expected), key
    none, quarter, one = (counted(model, 4, LENGTH, images)["cross_attention", 0] for images in (0, 0.25, 1))
    assert none.attention_forward == 0  # nothing to look at in three of four microbatches
    assert quarter.attention_forward == pytest.approx(one.attention_forward / 4)
    assert replace(quarter, attention_forward=0.0, attention_backward=0.0).forward > none.forward
