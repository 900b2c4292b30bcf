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
- Recomputation of activations is never part of model FLOPs. It is part of `executed_flops`.

Source of the rules: PaLM (arXiv 2204.02311, appendix B) for model FLOPs without recomputation; 4P for frozen weights as
in Megatron-Bridge's flop_utils.py, which counts two thirds for a frozen base under LoRA.

The figure of the first IDEFICS runs, `legacy_flops`, counts 8 per parameter and token for all parameters, frozen or
not, recomputation included. It is for comparison only and never to be shown without `LEGACY_LABEL`.

Legend: n positions, S sequence length, L latents per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_atum.config.schema import ModelConfig

LEGACY_LABEL = "8N (all parameters as if trained, recomputation included; not comparable with model FLOPs)"
RECOMPUTE = ("none", "full")
RECOMPUTED = ("cross_attention", "decoder")  # parts whose layers run forward again under full recomputation


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

    @property
    def model(self) -> int:
        return self.forward * (1 + self.gradients)


def model_flops(model: ModelConfig, work: Work) -> Flops:
    """Forward and backward, without recomputation."""
    return _sum(products(model, work), lambda product: product.model)


def executed_flops(model: ModelConfig, work: Work, recompute: str = "none") -> Flops:
    """Model FLOPs and what activation recomputation adds.

    Args:
        recompute: none | full: all cross-attention and decoder layers run forward once more.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}: must be one of {', '.join(RECOMPUTE)}")
    again = RECOMPUTED if recompute == "full" else ()
    return _sum(products(model, work), lambda product: product.model + product.forward * (product.part in again))


def legacy_flops(parameters: int, tokens: int) -> int:
    """The 8N figure. Show it with `LEGACY_LABEL`.

    Args:
        parameters: of the whole model, frozen ones included.
    """
    return 8 * parameters * tokens


def products(model: ModelConfig, work: Work) -> list[Product]:
    """All products of a step; those of one part and kind are added up."""
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


def _linear(part: str, weights: int, positions: int, *, trains: bool, input_needs: bool = True) -> Product:
    """A weight matrix applied to so many positions.

    Args:
        input_needs: whether the input needs a gradient.
    """
    return Product(part, 2 * weights * positions, trains + input_needs)


def _attention(part: str, queries: int, keys: int, width: int, *, needs: bool = True) -> Product:
    """Score and value products of all heads together.

    Args:
        queries: all of them.
        keys: that one query sees.
        width: of all heads.
    """
    return Product(part, 4 * queries * keys * width, 2 if needs else 0, is_attention=True)


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
        yield _linear("vision", qkv, n, trains=trains, input_needs=needs)
        yield _attention("vision", n, patches + 1, v.embed_dim, needs=needs or trains)
        yield _linear("vision", behind, n, trains=trains, input_needs=needs or trains)


def _perceiver(model: ModelConfig, images: int) -> Iterator[Product]:
    V, p = model.vision.embed_dim, model.perceiver
    inner, L = p.num_heads * p.head_dim, p.num_latents
    keys = (model.vision.image_size // model.vision.patch_size) ** 2 + 1 + L
    on_latents = 2 * V * inner + 2 * V * 4 * V  # query, output; MLP
    for _ in range(p.depth):
        yield _linear("perceiver", on_latents, images * L, trains=True)
        # The norm of the vision states trains, so the input of this projection needs a gradient in any case.
        yield _linear("perceiver", 2 * V * inner, images * keys, trains=True)
        yield _attention("perceiver", images * L, keys, inner)


def _cross_attention(model: ModelConfig, work: Work) -> Iterator[Product]:
    H, V, L = model.hidden_size, model.vision.embed_dim, model.perceiver.num_latents
    on_text = 2 * H * H + 3 * H * model.intermediate_size  # query, output; MLP, which every token goes through
    for _ in range(model.num_layers // model.cross_layer_interval):
        yield _linear("cross_attention", on_text, work.tokens, trains=True)
        yield _linear("cross_attention", 2 * H * V, work.images * L, trains=True)
        yield _attention("cross_attention", work.tokens_seeing, L, H)


def _decoder(model: ModelConfig, work: Work) -> Iterator[Product]:
    H, S = model.hidden_size, work.sequence_length
    weights = 4 * H * H + 3 * H * model.intermediate_size
    trains = not model.freeze.text or "Linear" in model.freeze.text_exceptions
    for _ in range(model.num_layers):
        yield _linear("decoder", weights, work.tokens, trains=trains)
        full = _attention("decoder", work.tokens, S, H)
        yield Product("decoder", full.forward // 2, full.gradients, is_attention=True)  # causal


def _head(model: ModelConfig, tokens: int) -> Iterator[Product]:
    H = model.hidden_size
    yield _linear("head", model.vocab_size * H, tokens, trains=not model.freeze.lm_head)
    yield _linear("head", model.additional_vocab_size * H, tokens, trains=True)
