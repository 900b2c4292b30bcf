"""The one FLOP counter: what a step of training computes, with frozen parts counted as what they cost.

Rules, for a weight matrix of P values that is applied to n positions (one multiplication and one addition per value):

- forward 2P n; gradient of the input 2P n; gradient of the weight 2P n, which a frozen weight does not have. So a
  trainable matrix costs 6P per position and a frozen one with something trainable below it 4P.
- Nothing below the first trainable input has a backward: the frozen vision tower costs its forward only. All decoder
  layers have one even if frozen, because the first gated cross-attention layer stands before decoder layer 0.
- Attention (score and value products) has no weights: three times its forward where anything below needs a gradient.
  Causal self-attention is counted at half of the S x S products. Tools that count it in full, such as torch's flop
  counter, show more.
- The key and value projections of cross-attention are applied to latents, not to text tokens; cross-attention's
  products to the tokens that see an image, each of which sees the latents of one.
- An embedding is a look-up: 0. The head is a frozen base and added rows that train. Norms, activations, rotary
  embeddings, biases and losses are left out (well under 1 %).
- Positions are rows x sequence length: padding goes through every product and is counted, as it is in figures of
  other trainers that multiply batch by length; packed rows have little of it. Padded vocabulary is not counted.
- Recomputation of activations is never part of model FLOPs. It is part of `executed_flops`: one more forward of what
  is recomputed. Selective recomputation repeats the first projection of each MLP and the attention products of
  cross-attention and decoder layers; full recomputation whole layers, also of the perceiver and of a vision tower that
  trains.

Source of the rules: PaLM (arXiv 2204.02311, appendix B) for model FLOPs without recomputation; 4P for frozen weights as
in Megatron-Bridge's flop_utils.py, which counts two thirds for a frozen base under LoRA.

The figure of the first IDEFICS runs, `legacy_flops`, counts 8 per parameter and token for all parameters, frozen or
not, recomputation included. It is for comparison only and never to be shown without `LEGACY_LABEL`.

Legend: n positions, S sequence length, L latents per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_atum.config.schema import ModelConfig

LEGACY_LABEL = "8N (all parameters as if trained, recomputation included; not comparable with model FLOPs)"
RECOMPUTE = ("none", "selective", "full")
TEXT_LAYERS = ("cross_attention", "decoder")


@dataclass(frozen=True)
class Work:
    """What a step computes on, over all ranks or any share of it."""

    rows: int
    sequence_length: int
    images: int  # each counted as seen by some token: the latents of others are not projected to keys and values
    tokens_with_image: int | None = None  # tokens that see an image; None: all, if there are images

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.rows * self.sequence_length

    @property
    def tokens_seeing(self) -> int:
        if self.tokens_with_image is not None:
            return self.tokens_with_image
        return self.tokens if self.images else 0


@dataclass(frozen=True)
class Flops:
    """FLOPs of the parts of the model."""

    vision: int
    perceiver: int
    cross_attention: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        return self.vision + self.perceiver + self.cross_attention + self.decoder + self.head


@dataclass(frozen=True)
class Product:
    """One kind of matrix product. Each gradient that it computes costs as much as its forward."""

    part: str
    forward: int
    gradients: int  # of its two inputs, how many need one: 0, 1 or 2
    is_attention: bool = False  # score and value products; else a weight is one of the inputs
    layer: int | None = None  # whose it is; of cross-attention the decoder layer that it stands in front of
    widens: bool = False  # first projection of an MLP

    @property
    def model(self) -> int:
        return self.forward * (1 + self.gradients)


def model_flops(model: ModelConfig, work: Work) -> Flops:
    """Forward and backward, without recomputation."""
    return _sum(products(model, work), lambda product: product.model)


def executed_flops(
    model: ModelConfig,
    work: Work,
    recompute: str = "none",
    *,
    method: str = "uniform",
    layers: int = 1,
    units_per_chunk: Sequence[int] | None = None,
) -> Flops:
    """Model FLOPs and what activation recomputation adds.

    Args:
        recompute, method, layers: training.recompute, recompute_method and recompute_layers.
        units_per_chunk: of the parallel layout (method=block recomputes the first layers of each chunk). None: one
            chunk.

    Raises:
        ValueError: recompute is none of `RECOMPUTE`.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}: must be one of {', '.join(RECOMPUTE)}")
    block = _first_layers(model, layers, units_per_chunk) if method == "block" else set(range(model.num_layers))

    def again(product: Product) -> bool:
        if recompute == "selective":
            return product.part in TEXT_LAYERS and (product.is_attention or product.widens)
        if recompute == "none" or product.layer is None:
            return False
        if product.part in TEXT_LAYERS:
            return product.layer in block
        return product.gradients > 0  # else nothing is kept in the first place

    return _sum(products(model, work), lambda product: product.model + product.forward * again(product))


def _first_layers(model: ModelConfig, number: int, units_per_chunk: Sequence[int] | None) -> set[int]:
    """Decoder layers that method=block recomputes."""
    found: set[int] = set()
    start = 0
    for units in units_per_chunk or (model.num_layers // model.cross_layer_interval,):
        stop = start + units * model.cross_layer_interval
        found |= set(range(start, min(start + number, stop)))
        start = stop
    return found


def legacy_flops(parameters: int, tokens: int) -> int:
    """The 8N figure. Show it with `LEGACY_LABEL`.

    Args:
        parameters: of the whole model, frozen ones included.
    """
    return 8 * parameters * tokens


def products(model: ModelConfig, work: Work) -> list[Product]:
    """All products of a step."""
    return [
        *_vision(model, work.images),
        *_perceiver(model, work.images),
        *_cross_attention(model, work),
        *_decoder(model, work),
        *_head(model, work.tokens),
    ]


def _sum(all_products: list[Product], flops_of: Callable[[Product], int]) -> Flops:
    parts = dict.fromkeys(("vision", "perceiver", "cross_attention", "decoder", "head"), 0)
    for product in all_products:
        parts[product.part] += flops_of(product)
    return Flops(**parts)


def _linear(
    part: str,
    weights: int,
    positions: int,
    *,
    trains: bool,
    input_needs: bool = True,
    layer: int | None = None,
    widens: bool = False,
) -> Product:
    """A weight matrix applied to so many positions.

    Args:
        input_needs: whether the input needs a gradient.
    """
    return Product(part, 2 * weights * positions, trains + input_needs, layer=layer, widens=widens)


def _attention(part: str, queries: int, keys: int, width: int, layer: int, *, needs: bool = True) -> Product:
    """Score and value products of all heads together.

    Args:
        queries: all of them.
        keys: that one query sees.
        width: of all heads.
    """
    return Product(part, 4 * queries * keys * width, 2 if needs else 0, is_attention=True, layer=layer)


def _vision(model: ModelConfig, images: int) -> Iterator[Product]:
    v, freeze = model.vision, model.freeze
    patches = (v.image_size // v.patch_size) ** 2
    n = images * (patches + 1)
    qkv, behind = 3 * v.embed_dim**2, v.embed_dim**2 + 2 * v.embed_dim * v.intermediate_size
    trains = not freeze.vision or "Linear" in freeze.vision_exceptions
    # Something below the first layer trains: embeddings, or the norm behind them.
    below = not freeze.vision or bool({"LayerNorm", "Embedding"} & set(freeze.vision_exceptions))
    patch = v.num_channels * v.patch_size**2 * v.embed_dim
    yield _linear("vision", patch, images * patches, trains=not freeze.vision, input_needs=False)
    for layer in range(v.num_layers):
        needs = below or (trains and layer > 0)
        yield _linear("vision", qkv, n, trains=trains, input_needs=needs, layer=layer)
        yield _attention("vision", n, patches + 1, v.embed_dim, layer, needs=needs or trains)
        yield _linear("vision", behind, n, trains=trains, input_needs=needs or trains, layer=layer)


def _perceiver(model: ModelConfig, images: int) -> Iterator[Product]:
    V, p = model.vision.embed_dim, model.perceiver
    inner, L = p.num_heads * p.head_dim, p.num_latents
    keys = (model.vision.image_size // model.vision.patch_size) ** 2 + 1 + L
    on_latents = 2 * V * inner + 2 * V * 4 * V  # query, output; MLP
    for block in range(p.depth):
        yield _linear("perceiver", on_latents, images * L, trains=True, layer=block)
        # The norm of the vision states trains, so the input of this projection needs a gradient in any case.
        yield _linear("perceiver", 2 * V * inner, images * keys, trains=True, layer=block)
        yield _attention("perceiver", images * L, keys, inner, block)


def _cross_attention(model: ModelConfig, work: Work) -> Iterator[Product]:
    H, V, L = model.hidden_size, model.vision.embed_dim, model.perceiver.num_latents
    widen = 2 * H * model.intermediate_size
    on_text = 2 * H * H + H * model.intermediate_size  # query, output; end of the MLP, which every token goes through
    for layer in range(0, model.num_layers, model.cross_layer_interval):
        yield _linear("cross_attention", on_text, work.tokens, trains=True, layer=layer)
        yield _linear("cross_attention", widen, work.tokens, trains=True, layer=layer, widens=True)
        yield _linear("cross_attention", 2 * H * V, work.images * L, trains=True, layer=layer)
        yield _attention("cross_attention", work.tokens_seeing, L, H, layer)


def _decoder(model: ModelConfig, work: Work) -> Iterator[Product]:
    H, S = model.hidden_size, work.sequence_length
    widen, others = 2 * H * model.intermediate_size, 4 * H * H + H * model.intermediate_size
    trains = not model.freeze.text or "Linear" in model.freeze.text_exceptions
    for layer in range(model.num_layers):
        yield _linear("decoder", others, work.tokens, trains=trains, layer=layer)
        yield _linear("decoder", widen, work.tokens, trains=trains, layer=layer, widens=True)
        full = _attention("decoder", work.tokens, S, H, layer)
        yield replace(full, forward=full.forward // 2)  # causal


def _head(model: ModelConfig, tokens: int) -> Iterator[Product]:
    H = model.hidden_size
    yield _linear("head", model.vocab_size * H, tokens, trains=not model.freeze.lm_head)
    yield _linear("head", model.additional_vocab_size * H, tokens, trains=True)
