"""A first ATUM from a LLaMA and a CLIP in Hugging Face format: their weights, and drawn ones for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_atum.checkpoint.hf_folder import HfFolder, check_names
from megatron_atum.checkpoint.table import hf_shapes, weight_table
from megatron_atum.checkpoint.weights import drawn
from megatron_atum.config.schema import ModelConfig, VisionConfig
from megatron_atum.errors import CheckpointError

_LLAMA_PREFIXES = ("model.embed_tokens.weight", "model.layers.", "model.norm.", "lm_head.weight")
_CLIP_PREFIX, _OUR_PREFIX = "vision_model.", "model.vision_model."


class Backbones:
    """The two folders, checked against each other and against what ATUM builds from them.

    Raises:
        CheckpointError: another kind of model, a part that ATUM does not build, or tensors that do not fit.
    """

    def __init__(self, llama: Path, clip: Path, base: ModelConfig) -> None:
        """Args:
        base: what the backbones do not say (added vocabulary, interval, perceiver, gates).
        """
        self.llama, self.clip = HfFolder(llama), HfFolder(clip)
        _expect(self.llama, "model_type", "llama")
        _expect(self.clip, "model_type", "clip")
        try:
            self.model = replace(_with_llama(base, self.llama), vision=_vision(self.clip))
        except KeyError as missing:
            raise CheckpointError(f"config.json of {llama} or of {clip} does not have the key {missing}") from None
        expected = hf_shapes(self.model)
        ours = {name: shape for name, shape in expected.items() if self._holder(name) is not None}
        check_names(f"{llama} and {clip}", self._shapes(), ours)

    def tensors(self, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the new model by Hugging Face name."""
        for row in weight_table(self.model):
            for name, tensor in zip(row.hf, self._row(row, seed), strict=True):
                yield name, tensor.to(dtype)

    def _row(self, row: Any, seed: int) -> list[Tensor]:
        holders = [self._holder(name) for name in row.hf]
        if holders[0] is None:
            return drawn(row, seed)
        return [folder.tensor(name) for folder, name in holders]  # type: ignore[misc]

    def _holder(self, name: str) -> tuple[HfFolder, str] | None:
        """Folder and key that hold one of our Hugging Face names; None: it is drawn."""
        if name.startswith(_OUR_PREFIX):
            return self.clip, name.removeprefix("model.")
        if name.startswith(_LLAMA_PREFIXES):
            tied = name == "lm_head.weight" and self.llama.config.get("tie_word_embeddings", False)
            return self.llama, "model.embed_tokens.weight" if tied else name
        return None

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What the folders hold, by our names. CLIP's text tower and projections are left out knowingly."""
        shapes = {name: self.llama.shape(name) for name in self.llama.names()}
        if self.llama.config.get("tie_word_embeddings", False) and "model.embed_tokens.weight" in shapes:
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        vision = {name for name in self.clip.names() if name.startswith(_CLIP_PREFIX)}
        return shapes | {f"model.{name}": self.clip.shape(name) for name in vision}


def _expect(folder: HfFolder, key: str, value: Any) -> None:
    if folder.config.get(key) != value:
        raise CheckpointError(f"{folder.path}/config.json: {key} is {folder.config.get(key)!r}, not {value!r}")


def _with_llama(base: ModelConfig, llama: HfFolder) -> ModelConfig:
    c = llama.config
    _expect(llama, "hidden_act", "silu")
    if c.get("num_key_value_heads", c["num_attention_heads"]) != c["num_attention_heads"]:
        raise CheckpointError(
            f"{llama.path}/config.json: num_key_value_heads={c['num_key_value_heads']}: grouped-query attention is "
            "not part of ATUM, every query head needs its own key head"
        )
    for key in ("attention_bias", "mlp_bias"):
        if c.get(key):
            raise CheckpointError(f"{llama.path}/config.json: {key} is set; ATUM's decoder has no biases")
    if c.get("head_dim") not in (None, c["hidden_size"] // c["num_attention_heads"]):
        raise CheckpointError(f"{llama.path}/config.json: head_dim={c['head_dim']} is not hidden_size / heads")
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or c.get("rope_scaling"):
        raise CheckpointError(f"{llama.path}/config.json: scaled rotary embeddings are not supported")
    return replace(
        base,
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        norm_eps=c["rms_norm_eps"],
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        max_position_embeddings=c["max_position_embeddings"],
    )


def _vision(clip: HfFolder) -> VisionConfig:
    c = clip.config["vision_config"]
    return VisionConfig(
        embed_dim=c["hidden_size"],
        image_size=c.get("image_size", 224),
        patch_size=c.get("patch_size", 32),
        intermediate_size=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_layers=c["num_hidden_layers"],
        num_channels=c.get("num_channels", 3),
        norm_eps=c.get("layer_norm_eps", 1e-5),
        hidden_act=c.get("hidden_act", "quick_gelu"),
    )
