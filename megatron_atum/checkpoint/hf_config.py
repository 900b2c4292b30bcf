"""Model configuration from and to Hugging Face's config.json of IDEFICS."""

from __future__ import annotations

import json
from typing import Any

from megatron_atum.config.schema import FreezeConfig, ModelConfig, PerceiverConfig, VisionConfig
from megatron_atum.config.validate import ALPHA_TYPES, VISION_ACTIVATIONS
from megatron_atum.errors import CheckpointError

# Hugging Face key -> ours and Hugging Face's default (configuration_idefics.py), which an absent key or null means.
_Keys = dict[str, tuple[str, Any]]
_TOP: _Keys = {
    "vocab_size": ("vocab_size", 32000),
    "additional_vocab_size": ("additional_vocab_size", 0),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "max_position_embeddings": ("max_position_embeddings", 2048),
    "cross_layer_interval": ("cross_layer_interval", 1),
    "qk_layer_norms": ("qk_norm", False),
    "alpha_type": ("alpha_type", "float"),
    "pad_token_id": ("pad_token_id", 0),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
}
_VISION: _Keys = {
    "embed_dim": ("embed_dim", 768),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 14),
    "intermediate_size": ("intermediate_size", 5120),
    "num_attention_heads": ("num_heads", 16),
    "num_hidden_layers": ("num_layers", 32),
    "num_channels": ("num_channels", 3),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "hidden_act": ("hidden_act", "gelu"),
}
_PERCEIVER: _Keys = {
    "resampler_depth": ("depth", 6),
    "resampler_n_heads": ("num_heads", 16),
    "resampler_head_dim": ("head_dim", 96),
    "resampler_n_latents": ("num_latents", 64),
    "qk_layer_norms_perceiver": ("qk_norm", False),
}
_FREEZE: _Keys = {
    "freeze_text_layers": ("text", True),
    "freeze_vision_layers": ("vision", True),
    "freeze_lm_head": ("lm_head", False),
}
_EXCEPTIONS: _Keys = {
    "freeze_text_module_exceptions": ("text_exceptions", []),
    "freeze_vision_module_exceptions": ("vision_exceptions", []),
}

# What this project does not build, with the only value it accepts, and what an absent key means.
_FIXED: dict[str, tuple[Any, Any]] = {
    "model_type": ("idefics", None),
    "hidden_act": ("silu", "silu"),
    "use_resampler": (True, False),
    "tie_word_embeddings": (False, False),
    "dropout": (0.0, 0.0),
}


def from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """A model configuration from the content of config.json, from the hub or as `PretrainedConfig.to_dict` gives it.

    Raises:
        CheckpointError: not an IDEFICS model, or one with a part that is not supported; names file and key.
    """
    for key, (only, default) in _FIXED.items():
        if hf.get(key, default) != only:
            raise CheckpointError(f"{where}: {key}={hf.get(key, default)!r} is not supported, only {only!r}")
    if hf.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config: quantized weights are not supported; take the original")
    for key in ("vision_config", "perceiver_config"):
        if not isinstance(hf.get(key), dict):
            raise CheckpointError(f"{where}: {key!r} is missing; is this the config.json of an IDEFICS model?")
    if hf["vision_config"].get("attention_dropout", 0.0):
        raise CheckpointError(f"{where}: vision_config.attention_dropout is not supported, only 0.0")
    model = ModelConfig(
        preset="",
        **_values(where, hf, _TOP),
        rope_theta=rope_theta(hf, where),
        vision=VisionConfig(**_values(f"{where}: vision_config", hf["vision_config"], _VISION)),
        perceiver=PerceiverConfig(**_values(f"{where}: perceiver_config", hf["perceiver_config"], _PERCEIVER)),
        freeze=FreezeConfig(**_values(where, hf, _FREEZE), **_values(where, hf, _EXCEPTIONS)),
    )
    for key, value, choices in (
        ("alpha_type", model.alpha_type, ALPHA_TYPES),
        ("vision_config.hidden_act", model.vision.hidden_act, VISION_ACTIVATIONS),
    ):
        if value not in choices:
            raise CheckpointError(f"{where}: {key}={value!r} is not supported, only {', '.join(choices)}")
    _check_consistent(where, model)
    return model


def rope_theta(hf: dict[str, Any], where: str) -> float:
    """Of rotary embeddings, from one of the keys it had over the years. Raises CheckpointError for scaled ones."""
    theta = hf.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: {key}={rope!r} is not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: {key}: rope_type={kind!r}: scaled rotary embeddings are not supported")
        theta = rope.get("rope_theta", theta)
    if type(theta) not in (int, float) or not 0 < theta < float("inf"):
        raise CheckpointError(f"{where}: rope_theta={theta!r} is not a positive number")
    return float(theta)


def _check_consistent(where: str, model: ModelConfig) -> None:
    """transformers accepts all of this, and fails later or computes something else."""
    sections = ((model, _TOP), (model.vision, _VISION), (model.perceiver, _PERCEIVER))
    for section, keys in sections:
        for key, (ours, default) in keys.items():
            value, may_be_zero = getattr(section, ours), key.endswith("_token_id") or key == "additional_vocab_size"
            if type(default) in (int, float) and not (0 < value < float("inf") or (may_be_zero and value == 0)):
                raise CheckpointError(f"{where}: {key}={value} is not possible; it must be positive")
    words = model.vocab_size + model.additional_vocab_size
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(model, key) >= words:
            raise CheckpointError(f"{where}: {key}={getattr(model, key)}, but the vocabulary has {words} entries")
    if model.vision.patch_size > model.vision.image_size:
        raise CheckpointError(f"{where}: vision_config: patch_size is larger than image_size")
    for key, value, of, divisor in (
        ("num_hidden_layers", model.num_layers, "cross_layer_interval", model.cross_layer_interval),
        ("hidden_size", model.hidden_size, "2 x num_attention_heads", 2 * model.num_heads),  # rotary: an even width
        ("vision_config: embed_dim", model.vision.embed_dim, "num_attention_heads", model.vision.num_heads),
    ):
        if value % divisor:
            raise CheckpointError(f"{where}: {key}={value} is not a multiple of {of}={divisor}")


def _values(where: str, hf: dict[str, Any], keys: _Keys) -> dict[str, Any]:
    """Our values of some keys. Their types are those of Hugging Face's defaults."""
    values = {}
    for key, (ours, default) in keys.items():
        value = default if hf.get(key) is None else hf[key]
        if isinstance(default, list) and isinstance(value, (list, tuple)):
            value = list(value)
        elif isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise CheckpointError(f"{where}: {key}={value!r} is not supported; it must be a {type(default).__name__}")
        values[ours] = value
    return values


def to_hf(model: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of config.json. The inverse of `from_hf` for what both know."""

    def hf_values(section: Any, keys: _Keys) -> dict[str, Any]:
        return {key: getattr(section, ours) for key, (ours, _) in keys.items()}

    return {
        **{key: only for key, (only, _) in _FIXED.items()},
        "architectures": ["IdeficsForVisionText2Text"],
        "dtype": dtype,
        **hf_values(model, _TOP),
        "alpha_initializer": "zeros",
        "alphas_initializer_range": 0.0,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **hf_values(model.freeze, _FREEZE),
        "freeze_text_module_exceptions": list(model.freeze.text_exceptions),
        "freeze_vision_module_exceptions": list(model.freeze.vision_exceptions),
        "vision_config": hf_values(model.vision, _VISION) | {"model_type": "idefics_vision"},
        "perceiver_config": hf_values(model.perceiver, _PERCEIVER)
        | {"model_type": "idefics_perciever", "use_resampler": True},
    }


# What transformers wrote of itself, and what other keys say now.
_STALE = ("torch_dtype", "_name_or_path", "transformers_version", "rope_theta", "rope_scaling")


def config_json(model: ModelConfig, dtype: str, original: bytes = b"{}") -> dict[str, Any]:
    """The content of config.json, with the further keys of the one that the model came with.

    Raises:
        CheckpointError: the original is not a JSON object.
    """
    try:
        old = json.loads(original)
        kept = {key: value for key, value in old.items() if key not in _STALE}
    except (ValueError, AttributeError):
        raise CheckpointError("the model came with a config.json that is not a JSON object") from None
    for key, value in to_hf(model, dtype).items():
        inner = kept.get(key)
        kept[key] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value
    return kept
