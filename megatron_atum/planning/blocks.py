"""What each part of ATUM computes in one microbatch, for the cost model.

FLOPs are those of `flops.py`, collectives those of `traffic.py`. What is counted here is elementwise work: values that
are read or written, times their bytes, from our code with torch's kernels and those that it fuses
(`parallel/fusion.py`). A backward is taken as twice a forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_atum.config.schema import ModelConfig
from megatron_atum.flops import Work, products
from megatron_atum.parallel.layout import Chunk
from megatron_atum.planning.cost import Block
from megatron_atum.planning.traffic import Microbatch, chunk_collectives, recomputed_layers
from megatron_atum.planning.weights import RankWeight, trainable_values

# Assumed: products of the vision tower and the perceiver, 1280 wide and a few hundred rows for each image, reach half
# of the peak where those of the decoder reach 80 %.
NARROW_SHARE = 0.625
# FlashAttention's backward makes five products where its forward makes two (arXiv 2307.08691, section 3.1).
FLASH_BACKWARD = 2.5
# megatron-core adds a bf16 gradient to its fp32 sum in a kernel of its own: 2 bytes read, 4 read, 4 written.
ACCUMULATION_BYTES = 10

# Decoder layer, each token. Of the residual stream: two norms (4 H), two additions (6 H). Of a rank's heads: turning
# queries and keys (4 H), output laid out again (2 H). MLP: SiLU and product (3 F).
DECODER_STREAM, DECODER_HEADS, MLP_COLUMNS = 10, 6, 3
# Cross-attention layer, each token: norms (4 H), gates (4 H), additions (6 H); query norm (2 H), queries sorted by
# image (2 H) and outputs back (5 H). Each latent: key norm (2 H).
CROSS_STREAM, CROSS_HEADS, CROSS_LATENTS = 14, 9, 2
# Vision layer, each position: norms (4 V), biases (10 V), additions (6 V), output laid out again (2 V); bias and GELU
# (2 F).
VISION_STREAM, VISION_COLUMNS = 22, 2
# Perceiver block, on every tensor rank. Each state and latent: norm and concatenation (4 V). Each latent besides:
# additions (6 V) and the MLP's norm (2 V). What is split over ranks (head norms, ReLU) is small and left out.
PERCEIVER_STATES, PERCEIVER_LATENTS = 4, 8
# Bytes for one logit of a rank: added columns and mask (8), maximum (2), fp32 exponentials and their sum (26); backward
# makes the softmax again and casts it (36) and undoes columns and mask (8).
LOGIT_FORWARD, LOGIT_BACKWARD = 36, 44
# Launches of a forward, for each layer or once, matrix products included.
KERNELS = {"vision": 19, "perceiver": 25, "cross_attention": 23, "decoder": 12, "head": 42, "embedding": 10}


@dataclass(frozen=True)
class Products:
    """FLOPs of some matrix products."""

    forward: float = 0.0
    backward: float = 0.0
    attention_forward: float = 0.0
    attention_backward: float = 0.0

    def plus(self, other: Products, factor: float = 1.0) -> Products:
        return Products(
            self.forward + factor * other.forward,
            self.backward + factor * other.backward,
            self.attention_forward + factor * other.attention_forward,
            self.attention_backward + factor * other.attention_backward,
        )


Counted = dict[tuple[str, int | None], Products]


def counted(model: ModelConfig, rows: int, length: int, images: float) -> Counted:
    """FLOPs of `flops.products` by part and layer.

    All of them are linear in images, so that between whole numbers they are interpolated.
    """
    low = math.floor(images)
    found: Counted = {}
    for whole, share in ((low, low + 1 - images), (low + 1, images - low)):
        for product in products(model, Work(rows, length, whole)) if share else ():
            if product.is_attention:
                backward = FLASH_BACKWARD * product.forward if product.gradients else 0.0
                one = Products(attention_forward=product.forward, attention_backward=backward)
            else:
                one = Products(product.forward, product.forward * product.gradients)
            key = (product.part, product.layer)
            found[key] = found.get(key, Products()).plus(one, share)
    return found


def model_blocks(micro: Microbatch) -> tuple[tuple[Block, ...], ...]:
    """What one microbatch costs on each stage, all of a stage's chunks together."""
    config, layout = micro.config, micro.layout
    flops = counted(config.model, micro.rows, config.data.sequence_length, micro.images)
    return tuple(
        tuple(
            block
            for chunk in layout.chunks_of(stage)
            for block in _chunk_blocks(micro, chunk, flops, micro.weights[chunk.index])
        )
        for stage in range(layout.pipeline)
    )


def _chunk_blocks(micro: Microbatch, chunk: Chunk, flops: Counted, weights: Sequence[RankWeight]) -> list[Block]:
    interval = micro.model.cross_layer_interval
    layers = range(chunk.units.start * interval, chunk.units.stop * interval)
    first = ("vision", "perceiver", "embedding") if chunk.is_first else ()
    names = (*first, "latents", "cross_attention", "decoder", *(("head",) if chunk.is_last else ()))
    collectives = chunk_collectives(micro, chunk)
    blocks = []
    for name in names:
        work = _work(flops, name, layers)
        moved = _elementwise(micro, name, len(layers))
        goes_back = work.backward > 0 or name in ("embedding", "latents")
        trained = trainable_values([weight for weight in weights if _part_of(weight) == name])
        block = Block(
            name,
            gemm_forward=work.forward,
            gemm_backward=work.backward,
            attention_forward=work.attention_forward,
            attention_backward=work.attention_backward,
            traffic_forward=moved,
            traffic_backward=(2 * moved if goes_back else 0.0) + micro.layout.tensor * ACCUMULATION_BYTES * trained,
            kernels_forward=_kernels(micro.model, name, len(layers)),
            kernels_backward=2 * _kernels(micro.model, name, len(layers)) if goes_back else 0.0,
            collectives=collectives.get(name, ()),
            gemm_share=NARROW_SHARE if name in ("vision", "perceiver") else 1.0,
        )
        blocks.append(_with_recomputation(micro, _adjusted(micro, block), layers))
    return blocks


def _work(flops: Counted, name: str, layers: range) -> Products:
    work = Products()
    for (part, layer), one in flops.items():
        if part == name and (layer in layers or part not in ("cross_attention", "decoder")):
            work = work.plus(one)
    return work


_PARTS = {"cross_attention_layers": "cross_attention", "decoder_layers": "decoder", "final_norm": "head"}


def _part_of(weight: RankWeight) -> str:
    part = weight.name.split(".")[0]
    return _PARTS.get(part, part)


def _adjusted(micro: Microbatch, block: Block) -> Block:
    """What is special about vision tower and head."""
    model, ranks = micro.model, micro.layout.tensor
    if block.name == "vision":
        # The busiest tensor rank encodes its share, and the cost model divides by the ranks.
        factor = ranks * micro.images_of_rank / micro.images if micro.images else 0.0
        names = ("gemm_forward", "gemm_backward", "attention_forward", "attention_backward")
        return replace(block, **{name: getattr(block, name) * factor for name in names})
    if block.name == "head":
        logits = micro.tokens * (model.vocab_size + ranks * model.additional_vocab_size)
        # Every tensor rank computes the added rows.
        again = (ranks - 1) * 2.0 * micro.tokens * model.additional_vocab_size * model.hidden_size
        return replace(
            block,
            gemm_forward=block.gemm_forward + again,
            gemm_backward=block.gemm_backward + 2 * again,
            traffic_forward=block.traffic_forward + LOGIT_FORWARD * logits,
            traffic_backward=block.traffic_backward + LOGIT_BACKWARD * logits,
        )
    return block


def _elementwise(micro: Microbatch, name: str, layers: int) -> float:
    """Bytes of a forward. Without sequence parallelism the residual stream is whole on every tensor rank."""
    model, vision, ranks = micro.model, micro.model.vision, micro.layout.tensor
    H, V, L = model.hidden_size, vision.embed_dim, model.perceiver.num_latents
    copies = ranks // micro.layout.sequence_shards
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    columns = MLP_COLUMNS * model.intermediate_size
    values: float
    if name == "decoder":
        values = layers * micro.tokens * (copies * DECODER_STREAM * H + DECODER_HEADS * H + columns)
    elif name == "cross_attention":
        of_tokens = micro.tokens * (copies * CROSS_STREAM * H + CROSS_HEADS * H + columns)
        values = layers / model.cross_layer_interval * (of_tokens + micro.images * CROSS_LATENTS * L * H)
    elif name == "vision":
        of_position = VISION_STREAM * V + VISION_COLUMNS * vision.intermediate_size
        values = ranks * (micro.images_of_rank if micro.images else 0) * vision.num_layers * positions * of_position
    elif name == "perceiver":
        of_image = PERCEIVER_STATES * (positions + L) + PERCEIVER_LATENTS * L
        values = ranks * micro.images * model.perceiver.depth * of_image * V
    elif name == "latents":
        values = ranks * 4.0 * micro.latent_bytes / micro.item  # cut off, and ordered by their use
    else:  # of the head its norm (4 H) and a copy, of the embedding the choice between its tables
        values = copies * micro.tokens * 6 * H
    return values * micro.item


def _kernels(model: ModelConfig, name: str, layers: int) -> float:
    number = {
        "vision": model.vision.num_layers,
        "perceiver": model.perceiver.depth,
        "cross_attention": layers // model.cross_layer_interval,
        "decoder": layers,
    }
    return KERNELS.get(name, 0) * number.get(name, 1)


def _with_recomputation(micro: Microbatch, block: Block, layers: range) -> Block:
    """Adds what backward computes again; the collectives of it are in `traffic.py` already."""
    model, recompute, name = micro.model, micro.config.training.recompute, block.name
    if recompute == "selective" and name in ("cross_attention", "decoder"):
        number = len(layers) if name == "decoder" else len(layers) // model.cross_layer_interval
        columns = number * micro.tokens * model.intermediate_size
        return replace(
            block,
            gemm_backward=block.gemm_backward + 4.0 * columns * model.hidden_size,
            attention_backward=block.attention_backward + block.attention_forward,
            traffic_backward=block.traffic_backward + MLP_COLUMNS * columns * micro.item,
        )
    share = 0.0
    if recompute == "full" and name in ("cross_attention", "decoder"):
        share = recomputed_layers(micro.config, len(layers))[0] / len(layers)
    elif recompute == "full" and name in ("vision", "perceiver") and block.gemm_backward:
        share = 1.0
    return replace(
        block,
        gemm_backward=block.gemm_backward + share * block.gemm_forward,
        attention_backward=block.attention_backward + share * block.attention_forward,
        traffic_backward=block.traffic_backward + share * block.traffic_forward,
        kernels_backward=block.kernels_backward + share * block.kernels_forward,
    )
