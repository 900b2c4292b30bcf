"""Named models. Values of the released checkpoints' config.json; `tiny` is for machines without a GPU."""

from __future__ import annotations

from typing import Any

from megatron_atum.config.suggest import unknown
from megatron_atum.errors import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_layers": 4,
        "num_heads": 4,
        "cross_layer_interval": 1,
        "vision": {
            "embed_dim": 64,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_size": 128,
            "num_heads": 4,
            "num_layers": 2,
        },
        "perceiver": {"depth": 1, "num_heads": 4, "head_dim": 16, "num_latents": 8},
        "freeze": {"text": False, "vision": False, "lm_head": False},
    },
    "atum-9b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_layers": 32,
        "num_heads": 32,
        "norm_eps": 1e-6,
    },
    "atum-80b": {
        "hidden_size": 8192,
        "intermediate_size": 22016,
        "num_layers": 80,
        "num_heads": 64,
        "norm_eps": 1e-5,
    },
}


def preset_values(name: str) -> dict[str, Any]:
    """Keys of `model` that a preset sets.

    Raises:
        ConfigError: no such preset.
    """
    if name not in PRESETS:
        raise ConfigError(unknown("model.preset", name, PRESETS))
    return {"preset": name, **PRESETS[name]}
