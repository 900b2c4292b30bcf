"""The FLOP counter against published figures, against 6P, and against torch's counter on the real model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_atum.batch import Batch
from megatron_atum.checkpoint.table import hf_shapes
from megatron_atum.config.loader import preset
from megatron_atum.config.schema import FreezeConfig, ModelConfig, PerceiverConfig, TrainingConfig, VisionConfig
from megatron_atum.flops import LEGACY_LABEL, Flops, Work, executed_flops, legacy_flops, model_flops, products
from tests.distributed import run_distributed

UNFROZEN = FreezeConfig(text=False, vision=False, lm_head=False)
# as densely filled with images as the mixture of the first IDEFICS runs
ROW = Work(rows=1, sequence_length=1024, images=11)


def text_side(flops: Flops) -> int:
    return flops.cross_attention + flops.decoder + flops.head


def test_published_figures() -> None:
    model = preset("atum-80b")
    assert text_side(model_flops(model, ROW)) / ROW.tokens == pytest.approx(348e9, rel=0.01)
    assert text_side(executed_flops(model, ROW, "full")) / ROW.tokens == pytest.approx(507e9, rel=0.01)
    assert model_flops(model, replace(ROW, images=1)).vision == pytest.approx(336e9, rel=0.01)
    assert legacy_flops(79_967_843_624, 1) == pytest.approx(640e9, rel=0.01)
    assert "8N" in LEGACY_LABEL


def positions_of(key: str, model: ModelConfig, work: Work) -> int:
    """To how many positions a Hugging Face weight is applied."""
    patches = (model.vision.image_size // model.vision.patch_size) ** 2
    latents = model.perceiver.num_latents
    if "vision_model" in key:
        return work.images * (patches + 1)
    is_key_value = ".k_proj." in key or ".v_proj." in key
    if "perceiver_resampler" in key:
        return work.images * (latents + (patches + 1 if is_key_value else 0))
    if "cross_attn" in key and is_key_value:
        return work.images * latents
    return work.tokens


@pytest.mark.parametrize("name", ["tiny", "atum-9b", "atum-80b"])
def test_everything_unfrozen_costs_six_per_weight_and_position(name: str) -> None:
    model = replace(preset(name), freeze=UNFROZEN)
    work = Work(rows=3, sequence_length=1024, images=17)
    linear = {key: shape for key, shape in hf_shapes(model).items() if len(shape) == 2 and is_linear(key)}
    six = sum(6 * math.prod(shape) * positions_of(key, model, work) for key, shape in linear.items())
    v = model.vision
    patch = v.num_channels * v.patch_size**2 * v.embed_dim * work.images * (v.image_size // v.patch_size) ** 2
    attention = sum(p.model for p in products(model, work) if p.is_attention)
    # pixels need no gradient, so the patch projection costs 4
    assert model_flops(model, work).total - attention == six + 4 * patch
    assert attention == 3 * attention_forward(model, work)


def is_linear(key: str) -> bool:
    return "embed" not in key and key.endswith("weight")


def attention_forward(model: ModelConfig, work: Work) -> int:
    """Score and value products, 2 FLOPs per multiplication and addition, causal attention by half."""
    v, p, H = model.vision, model.perceiver, model.hidden_size
    P, L = (v.image_size // v.patch_size) ** 2 + 1, p.num_latents
    vision = v.num_layers * work.images * P * P * v.embed_dim
    perceiver = p.depth * work.images * L * (P + L) * p.num_heads * p.head_dim
    cross = model.num_layers // model.cross_layer_interval * work.tokens_seeing * L * H
    causal = model.num_layers * work.rows * work.sequence_length**2 * H // 2
    return 4 * (vision + perceiver + cross + causal)


def test_frozen_parts_cost_what_they_run() -> None:
    model = preset("atum-9b")
    frozen, free = (model_flops(m, ROW) for m in (model, replace(model, freeze=UNFROZEN)))
    assert frozen.perceiver == free.perceiver
    assert frozen.cross_attention == free.cross_attention
    matrices = 6_476_267_520 - 32 * 2 * 4096  # values of the decoder layers, without two norms each
    assert free.decoder - frozen.decoder == 2 * ROW.tokens * matrices
    assert free.head - frozen.head == 2 * ROW.tokens * 32000 * 4096
    assert free.vision / frozen.vision == pytest.approx(3, rel=0.01)


def test_without_images_only_the_text_side_costs() -> None:
    no_images = replace(ROW, images=0)
    flops = model_flops(preset("atum-9b"), no_images)
    assert all(p.forward == 0 for p in products(preset("atum-9b"), no_images) if p.is_attention and p.part != "decoder")
    assert (flops.vision, flops.perceiver) == (0, 0)
    with_images = model_flops(preset("atum-9b"), ROW)
    assert 0 < flops.cross_attention < with_images.cross_attention
    assert flops.decoder == with_images.decoder


def forward_of(model: ModelConfig, *parts: str) -> int:
    return sum(p.forward for p in products(model, ROW) if p.part in parts)


def test_full_recomputation_adds_one_forward_of_the_layers_and_is_not_in_model_flops() -> None:
    model = preset("atum-9b")
    plain, none, full = model_flops(model, ROW), executed_flops(model, ROW), executed_flops(model, ROW, "full")
    assert none == plain
    assert full.total - plain.total == forward_of(model, "decoder", "cross_attention", "perceiver")
    assert (full.vision, full.head) == (plain.vision, plain.head)
    free = replace(model, freeze=UNFROZEN)
    patch = products(free, ROW)[0].forward  # in front of the layers
    more = executed_flops(free, ROW, "full").vision - model_flops(free, ROW).vision
    assert more == forward_of(free, "vision") - patch
    with pytest.raises(ValueError, match="none, selective, full"):
        executed_flops(model, ROW, "some")


def test_selective_recomputation_adds_the_widening_and_the_attention_products() -> None:
    model = preset("atum-9b")
    H, wide, n = model.hidden_size, 2 * model.intermediate_size, ROW.tokens
    more = executed_flops(model, ROW, "selective").decoder - model_flops(model, ROW).decoder
    assert more == model.num_layers * (2 * n * H * wide + 4 * n * n * H // 2)
    more = executed_flops(model, ROW, "selective").cross_attention - model_flops(model, ROW).cross_attention
    assert more == model.num_layers // 4 * (2 * n * H * wide + 4 * n * 64 * H)


def test_recomputation_by_block_counts_the_first_layers_of_each_chunk() -> None:
    model = preset("atum-9b")

    def more(layers: int, *units: int) -> tuple[float, float]:
        """Layers that run again: of the decoder, of cross-attention."""
        block = executed_flops(model, ROW, "full", method="block", layers=layers, units_per_chunk=units or None)
        plain = model_flops(model, ROW)
        return (
            (block.decoder - plain.decoder) / forward_of(model, "decoder") * 32,
            (block.cross_attention - plain.cross_attention) / forward_of(model, "cross_attention") * 8,
        )

    assert more(1) == (1, 1)
    assert more(5) == (5, 2)
    assert more(5, 4, 4) == (10, 4)
    assert more(5, 1, 6, 1) == (4 + 5 + 4, 1 + 2 + 1)
    assert more(99, 1, 6, 1) == (32, 8)


# The real model -------------------------------------------------------------------------------------------------------

TINY = ModelConfig(
    vocab_size=96,
    additional_vocab_size=2,
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    cross_layer_interval=2,
    vision=VisionConfig(embed_dim=16, image_size=8, patch_size=4, intermediate_size=24, num_heads=2, num_layers=2),
    perceiver=PerceiverConfig(depth=2, num_heads=2, head_dim=12, num_latents=3),
)
FREEZING = {
    "pretraining": FreezeConfig(),
    "unfrozen": UNFROZEN,
    "frozen head only": replace(UNFROZEN, lm_head=True),
    "frozen vision only": replace(UNFROZEN, vision=True),
    "frozen text but for its matrices": FreezeConfig(text_exceptions=["Linear"]),
    "frozen vision but for its norms": FreezeConfig(vision_exceptions=["LayerNorm"]),
    "frozen vision but for its positions": FreezeConfig(vision_exceptions=["Embedding"]),
}


def tiny_batch() -> Batch:
    """Two rows of 8 tokens; of 16 tokens 11 see one of 3 images, and every image is seen."""
    index = torch.tensor([[-1, 0, 0, 0, 1, 1, -1, -1], [-1, -1, 0, 0, 0, 0, 0, 0]])
    ids, ones = torch.arange(16).view(2, 8), torch.ones(2, 8)
    return Batch(
        input_ids=ids,
        labels=ids,
        loss_mask=ones,
        z_mask=ones,
        position_ids=torch.arange(8).expand(2, 8),
        pixels=torch.randn(3, 3, 8, 8),
        image_index=index,
        images_per_row=torch.tensor([2, 1]),
        source=("a", "a"),
        pack_ids=torch.arange(2),
    )


def counted(
    rank: int, world_size: int, freezes: list[FreezeConfig], training: TrainingConfig | None = None
) -> list[dict[str, int]]:
    """FLOPs per operation of one forward and backward of the whole model, as torch counts them."""
    return [_counted(replace(TINY, freeze=freeze), training) for freeze in freezes]


def _counted(model: ModelConfig, training: TrainingConfig | None) -> dict[str, int]:
    from megatron_atum.model.inputs import prepare
    from megatron_atum.model.stage import build_stages
    from megatron_atum.parallel.cpu_compat import emulated_cuda
    from megatron_atum.parallel.groups import build_groups
    from megatron_atum.parallel.layout import ParallelLayout

    groups = build_groups(ParallelLayout(world_size=1, units_per_chunk=(2,)))
    (stage,) = build_stages(model, groups, torch.float32, training)
    for parameter in stage.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    inputs = prepare([tiny_batch()], model, groups, torch.device("cpu"), torch.float32)
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with emulated_cuda(), counter:
        stage(inputs[0]).sum().backward()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)


# torch counts the attention kernels of CUDA only; in their backward also the recomputed scores, which we do not count
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def test_equal_to_torch_on_the_real_model() -> None:
    """To the unit, except that torch counts causal attention in full: S x S products of every head."""
    results = run_distributed(counted, 1, list(FREEZING.values()))[0]
    work = Work(rows=2, sequence_length=8, images=3, tokens_with_image=11)
    for name, freeze, by_op in zip(FREEZING, FREEZING.values(), results, strict=True):
        model = replace(TINY, freeze=freeze)
        attention = {op: flops for op, flops in by_op.items() if "attention" in op}
        assert len(attention) == 2, name
        matrices = sum(p.model for p in products(model, work) if not p.is_attention)
        assert sum(by_op.values()) - sum(attention.values()) == matrices, name
        causal_half = sum(p.model for p in products(model, work) if p.is_attention and p.part == "decoder")
        assert sum(by_op.values()) == model_flops(model, work).total + causal_half, name


def test_the_first_vision_layer_needs_no_input_gradient_when_only_matrices_train() -> None:
    """megatron-core's linear layers compute the input's gradient even where nobody needs it; it is not counted."""
    freeze = FreezeConfig(vision_exceptions=["Linear"])
    by_op = run_distributed(counted, 1, [freeze])[0][0]
    model, work = replace(TINY, freeze=freeze), Work(rows=2, sequence_length=8, images=3, tokens_with_image=11)
    matrices = sum(p.model for p in products(model, work) if not p.is_attention)
    unneeded = 2 * (3 * model.vision.embed_dim**2) * work.images * 5
    assert sum(flops for op, flops in by_op.items() if "attention" not in op) == matrices + unneeded


@pytest.mark.parametrize(
    ("kind", "method", "layers"),
    [("selective", "uniform", 1), ("full", "uniform", 1), ("full", "uniform", 3), ("full", "block", 3)],
)
def test_executed_equals_torch_on_the_real_model(kind: str, method: str, layers: int) -> None:
    """Causal attention in full, as above: also where it is recomputed."""
    training = TrainingConfig(recompute=kind, recompute_method=method, recompute_layers=layers)
    freezes = [FreezeConfig(), UNFROZEN]
    work = Work(rows=2, sequence_length=8, images=3, tokens_with_image=11)
    for freeze, by_op in zip(freezes, run_distributed(counted, 1, freezes, training)[0], strict=True):
        model = replace(TINY, freeze=freeze)
        executed = executed_flops(model, work, kind, method=method, layers=layers)
        causal = [p for p in products(model, work) if p.is_attention and p.part == "decoder"]
        again = layers if method == "block" else len(causal)
        causal_half = sum(p.model for p in causal) + again * causal[0].forward
        assert sum(by_op.values()) == executed.total + causal_half
