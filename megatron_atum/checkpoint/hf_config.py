"""Model configuration from and to Hugging Face's config.json of IDEFICS."""

from __future__ import annotations

from typing import Any

from megatron_atum.config.schema import FreezeConfig, ModelConfig, PerceiverConfig, VisionConfig
from megatron_atum.errors import CheckpointError

# Hugging Face key -> ours, same meaning and type, read and written alike.
_TOP = {
    "vocab_size": "vocab_size",
    "additional_vocab_size": "additional_vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position_embeddings",
    "cross_layer_interval": "cross_layer_interval",
    "qk_layer_norms": "qk_norm",
    "alpha_type": "alpha_type",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_VISION = {
    "embed_dim": "embed_dim",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "num_channels": "num_channels",
    "layer_norm_eps": "norm_eps",
    "hidden_act": "hidden_act",
}
_PERCEIVER = {
    "resampler_depth": "depth",
    "resampler_n_heads": "num_heads",
    "resampler_head_dim": "head_dim",
    "resampler_n_latents": "num_latents",
    "qk_layer_norms_perceiver": "qk_norm",
}
_FREEZE = {"freeze_text_layers": "text", "freeze_vision_layers": "vision", "freeze_lm_head": "lm_head"}

# What this project does not build, with the only value it accepts.
_FIXED: dict[str, Any] = {
    "model_type": "idefics",
    "hidden_act": "silu",
    "use_resampler": True,
    "tie_word_embeddings": False,
    "dropout": 0.0,
}


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """A model configuration from the content of config.json, as `PretrainedConfig.to_dict` gives it.

    Raises:
        CheckpointError: not an IDEFICS model, or one with a part that is not supported; names file and key.
    """
    for key, value in _FIXED.items():
        if hf.get(key, value) != value:
            raise CheckpointError(f"{where}: {key}={hf[key]!r} is not supported, only {value!r}")
    if hf.get("vision_config", {}).get("attention_dropout", 0.0):
        raise CheckpointError(f"{where}: vision_config.attention_dropout is not supported, only 0.0")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"{where}: rope_parameters.rope_type={rope['rope_type']!r} is not supported")
    try:
        return ModelConfig(
            preset="",
            **{ours: hf[key] for key, ours in _TOP.items()},
            rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
            vision=VisionConfig(**{ours: hf["vision_config"][key] for key, ours in _VISION.items()}),
            perceiver=PerceiverConfig(**{ours: hf["perceiver_config"][key] for key, ours in _PERCEIVER.items()}),
            freeze=FreezeConfig(
                **{ours: hf[key] for key, ours in _FREEZE.items()},
                text_exceptions=list(hf.get("freeze_text_module_exceptions", [])),
                vision_exceptions=list(hf.get("freeze_vision_module_exceptions", [])),
            ),
        )
    except KeyError as missing:
        raise CheckpointError(f"{where}: key {missing} is missing; is this the config.json of an IDEFICS model?") from None


def to_hf(model: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of config.json. The inverse of `from_hf` for what both know."""
    v, p, f = model.vision, model.perceiver, model.freeze
    return {
        **_FIXED,
        "architectures": ["IdeficsForVisionText2Text"],
        "dtype": dtype,
        **{key: getattr(model, ours) for key, ours in _TOP.items()},
        "alpha_initializer": "zeros",
        "alphas_initializer_range": 0.0,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **{key: getattr(f, ours) for key, ours in _FREEZE.items()},
        "freeze_text_module_exceptions": list(f.text_exceptions),
        "freeze_vision_module_exceptions": list(f.vision_exceptions),
        "vision_config": {key: getattr(v, ours) for key, ours in _VISION.items()} | {"model_type": "idefics_vision"},
        "perceiver_config": {key: getattr(p, ours) for key, ours in _PERCEIVER.items()}
        | {"model_type": "idefics_perciever", "use_resampler": True},
    }
