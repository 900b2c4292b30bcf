"""The one table of weights: our name, the Hugging Face names, how it is split, how it starts.

Import, export, initialisation and the parity tests all read it, so there is no second list to forget. Names are
global: layers carry their number in the whole model at every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_atum.checkpoint.rules import Fused, HeadsInterleaved, Replicated, Rule, Split, Vocabulary
from megatron_atum.config.schema import ModelConfig

_OWN = ("cross_attention_layers.", "perceiver.", "embedding.added.", "head.added.")
BACKBONE_STD = 0.02  # of a backbone that is not loaded (HF: initializer_range)


@dataclass(frozen=True)
class Init:
    """N(0, std), or a constant where std is 0."""

    std: float = 0.0
    constant: float = 0.0


@dataclass(frozen=True)
class Weight:
    """One row. `hf` and `shapes` run in parallel; shapes are Hugging Face's."""

    name: str
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    rule: Rule
    init: Init

    @property
    def backbone(self) -> bool:
        """Whether it comes with the LLaMA or the CLIP; the rest is ATUM's own and always trains."""
        return not self.name.startswith(_OWN)


ONE, ZERO = Init(constant=1.0), Init()
COLUMN, ROW, WHOLE, FUSED = Split(0), Split(1), Replicated(), Fused()


def _row(name: str, hf: str | tuple[str, ...], shape: tuple[int, ...], rule: Rule, init: Init) -> Weight:
    names = (hf,) if isinstance(hf, str) else hf
    return Weight(name, names, (shape,) * len(names), rule, init)


def weight_table(model: ModelConfig) -> list[Weight]:
    """All weights of a model. Standard deviations: m4's IdeficsPreTrainedModel._init_weights."""
    return [
        *_embedding(model),
        *_vision(model),
        *_perceiver(model),
        *(row for unit in range(model.num_layers // model.cross_layer_interval) for row in _gated(model, unit)),
        *(row for layer in range(model.num_layers) for row in _decoder(model, layer)),
        *_head(model),
    ]


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the Hugging Face state dict with its shape."""
    return {hf: shape for row in weight_table(model) for hf, shape in zip(row.hf, row.shapes, strict=True)}


def _embedding(m: ModelConfig) -> Iterator[Weight]:
    H, std = m.hidden_size, Init(math.sqrt(1 / m.hidden_size))
    hf = "model.embed_tokens"
    yield _row("embedding.base.weight", f"{hf}.weight", (m.vocab_size, H), Vocabulary(), std)
    if m.additional_vocab_size:
        shape = (m.additional_vocab_size, H)
        yield _row("embedding.added.weight", f"{hf}.additional_embedding.weight", shape, WHOLE, std)


def _head(m: ModelConfig) -> Iterator[Weight]:
    H, std = m.hidden_size, Init(math.sqrt(1 / m.hidden_size))
    yield _row("final_norm.weight", "model.norm.weight", (H,), WHOLE, ONE)
    yield _row("head.base.weight", "lm_head.weight", (m.vocab_size, H), Vocabulary(), std)
    if m.additional_vocab_size:
        yield _row("head.added.weight", "lm_head.additional_fc.weight", (m.additional_vocab_size, H), WHOLE, std)


def _decoder(m: ModelConfig, layer: int) -> Iterator[Weight]:
    H, F, std = m.hidden_size, m.intermediate_size, Init(BACKBONE_STD)
    ours, hf = f"decoder_layers.{layer}", f"model.layers.{layer}"
    qkv = tuple(f"{hf}.self_attn.{x}_proj.weight" for x in "qkv")
    yield _row(f"{ours}.input_layernorm.weight", f"{hf}.input_layernorm.weight", (H,), WHOLE, ONE)
    yield _row(f"{ours}.self_attention.linear_qkv.weight", qkv, (H, H), HeadsInterleaved(m.num_heads), std)
    yield _row(f"{ours}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", (H, H), ROW, std)
    yield _row(f"{ours}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", (H,), WHOLE, ONE)
    yield from _swiglu(ours, hf, H, F, std, std)


def _swiglu(ours: str, hf: str, H: int, F: int, up: Init, down: Init) -> Iterator[Weight]:
    gate_up = (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight")
    yield _row(f"{ours}.mlp.linear_fc1.weight", gate_up, (F, H), FUSED, up)
    yield _row(f"{ours}.mlp.linear_fc2.weight", f"{hf}.mlp.down_proj.weight", (H, F), ROW, down)


def _gated(m: ModelConfig, unit: int) -> Iterator[Weight]:
    H, F, V = m.hidden_size, m.intermediate_size, m.vision.embed_dim
    from_hidden, from_latents = Init(math.sqrt(0.4 / H)), Init(math.sqrt(0.4 / V))
    down = Init(math.sqrt(0.4 / (F * 2 * m.num_layers)))
    ours, hf = f"cross_attention_layers.{unit}", f"model.gated_cross_attn_layers.{unit}"
    key_value = (f"{hf}.cross_attn.k_proj.weight", f"{hf}.cross_attn.v_proj.weight")
    yield _row(f"{ours}.input_norm.weight", f"{hf}.input_layernorm.weight", (H,), WHOLE, ONE)
    yield _row(f"{ours}.attention.query.weight", f"{hf}.cross_attn.q_proj.weight", (H, H), COLUMN, from_hidden)
    yield _row(f"{ours}.attention.key_value.weight", key_value, (H, V), FUSED, from_latents)
    yield _row(f"{ours}.attention.output.weight", f"{hf}.cross_attn.o_proj.weight", (H, H), ROW, from_hidden)
    if m.qk_norm:
        for x, name in (("q", "query"), ("k", "key")):
            head = (H // m.num_heads,)
            hf_name = f"{hf}.cross_attn.{x}_layer_norm.weight"
            yield _row(f"{ours}.attention.{name}_norm.weight", hf_name, head, WHOLE, ONE)
    yield _row(f"{ours}.post_attention_norm.weight", f"{hf}.post_attention_layernorm.weight", (H,), WHOLE, ONE)
    yield from _swiglu(ours, hf, H, F, from_hidden, down)
    shape = (1,) if m.alpha_type == "float" else (1, 1, H)
    gate = Init(constant=m.alpha_init)
    yield _row(f"{ours}.alpha_attention", f"{hf}.alpha_cross_attn", shape, WHOLE, gate)
    yield _row(f"{ours}.alpha_mlp", f"{hf}.alpha_dense", shape, WHOLE, gate)


def _norm(ours: str, hf: str, width: int) -> Iterator[Weight]:
    yield _row(f"{ours}.weight", f"{hf}.weight", (width,), WHOLE, ONE)
    yield _row(f"{ours}.bias", f"{hf}.bias", (width,), WHOLE, ZERO)


def _perceiver(m: ModelConfig) -> Iterator[Weight]:
    V, p = m.vision.embed_dim, m.perceiver
    inner, std = p.num_heads * p.head_dim, Init(math.sqrt(0.4 / V))
    down = Init(math.sqrt(0.4 / (V * 2 * m.num_layers)))
    ours, hf = "perceiver", "model.perceiver_resampler"
    yield _row(f"{ours}.latents", f"{hf}.latents", (p.num_latents, V), WHOLE, Init(math.sqrt(1 / V)))
    for b in range(p.depth):
        attention, hf_attention = f"{ours}.blocks.{b}.attention", f"{hf}.blocks.{b}.0"
        key_value = (f"{hf_attention}.k_proj.weight", f"{hf_attention}.v_proj.weight")
        yield from _norm(f"{attention}.context_norm", f"{hf_attention}.context_layer_norm", V)
        yield from _norm(f"{attention}.latents_norm", f"{hf_attention}.latents_layer_norm", V)
        if p.qk_norm:
            yield from _norm(f"{attention}.query_norm", f"{hf_attention}.q_layer_norm", p.head_dim)
            yield from _norm(f"{attention}.key_norm", f"{hf_attention}.k_layer_norm", p.head_dim)
        yield _row(f"{attention}.query.weight", f"{hf_attention}.q_proj.weight", (inner, V), COLUMN, std)
        yield _row(f"{attention}.key_value.weight", key_value, (inner, V), FUSED, std)
        yield _row(f"{attention}.output.weight", f"{hf_attention}.output_proj.weight", (V, inner), ROW, std)
        mlp, hf_mlp = f"{ours}.blocks.{b}.mlp", f"{hf}.blocks.{b}.1"
        yield from _norm(f"{mlp}.norm", f"{hf_mlp}.ln", V)
        yield _row(f"{mlp}.fc.weight", f"{hf_mlp}.fc.weight", (4 * V, V), COLUMN, std)
        yield _row(f"{mlp}.proj.weight", f"{hf_mlp}.c_proj.weight", (V, 4 * V), ROW, down)
    yield from _norm(f"{ours}.final_norm", f"{hf}.layer_norm", V)


def _vision(m: ModelConfig) -> Iterator[Weight]:
    v, std = m.vision, Init(BACKBONE_STD)
    V, tokens = v.embed_dim, (v.image_size // v.patch_size) ** 2 + 1
    ours, hf = "vision", "model.vision_model"
    patch = (V, v.num_channels, v.patch_size, v.patch_size)
    yield _row(f"{ours}.class_embedding", f"{hf}.embeddings.class_embedding", (V,), WHOLE, std)
    yield _row(f"{ours}.patch_embedding.weight", f"{hf}.embeddings.patch_embedding.weight", patch, WHOLE, std)
    yield _row(f"{ours}.position_embedding", f"{hf}.embeddings.position_embedding.weight", (tokens, V), WHOLE, std)
    yield from _norm(f"{ours}.pre_layernorm", f"{hf}.pre_layrnorm", V)  # the key is spelt so
    for n in range(v.num_layers):
        yield from _vision_layer(m, f"{ours}.layers.{n}", f"{hf}.encoder.layers.{n}", std)
    yield from _norm(f"{ours}.post_layernorm", f"{hf}.post_layernorm", V)


def _vision_layer(m: ModelConfig, ours: str, hf: str, std: Init) -> Iterator[Weight]:
    V, F = m.vision.embed_dim, m.vision.intermediate_size
    heads = HeadsInterleaved(m.vision.num_heads, split=False)
    yield from _norm(f"{ours}.input_layernorm", f"{hf}.layer_norm1", V)
    yield from _norm(f"{ours}.pre_mlp_layernorm", f"{hf}.layer_norm2", V)
    for kind, init in (("weight", std), ("bias", ZERO)):
        qkv = tuple(f"{hf}.self_attn.{x}_proj.{kind}" for x in "qkv")
        square = (V, V) if kind == "weight" else (V,)
        wide, narrow = ((F, V), (V, F)) if kind == "weight" else ((F,), (V,))
        yield _row(f"{ours}.self_attention.linear_qkv.{kind}", qkv, square, heads, init)
        yield _row(f"{ours}.self_attention.linear_proj.{kind}", f"{hf}.self_attn.out_proj.{kind}", square, WHOLE, init)
        yield _row(f"{ours}.mlp.linear_fc1.{kind}", f"{hf}.mlp.fc1.{kind}", wide, WHOLE, init)
        yield _row(f"{ours}.mlp.linear_fc2.{kind}", f"{hf}.mlp.fc2.{kind}", narrow, WHOLE, init)
